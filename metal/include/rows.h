// Packed rows of the sequence state, bit-identical to ds4py/kernels/rounding.py and cache/rows.py.
//
// Attention row of HD channels: HD - ROPE bytes E4M3 | one E8M0 per 64 channels | a zero byte if
// the count so far is odd | ROPE bfloat16. Index row of D channels: D/2 bytes of two E2M1 (the even
// channel in the low nibble) | one E8M0 per 32 channels. Every value is exact in bfloat16.
//
// The layout of work everywhere: one lane holds a pair of neighbouring channels, so 32 lanes hold
// one FP8 block of 64 channels, 16 lanes one FP4 block of 32, and a rotated pair never leaves a
// lane. Scales, packing and rotation then need no threadgroup memory.

constant constexpr uint FP8_BLOCK = 64;
constant constexpr uint FP4_BLOCK = 32;
constant constexpr float FP8_MAX = 448.0f;
constant constexpr float FP4_MAX = 6.0f;

constexpr uint attention_tail(uint nope) { return (nope + nope / FP8_BLOCK + 1) / 2 * 2; }

inline float e8m0_decode(uint code) { return as_type<float>(code << 23); }

// Both small formats are the top bits of a half with another bias; the product restores it, also
// for subnormals.
inline float e4m3_decode(uint code) {
  const half magnitude = as_type<half>(ushort((code & 0x7fu) << 7)) * 256.0h;
  return (code & 0x80u) ? -float(magnitude) : float(magnitude);
}

inline float e2m1_decode(uint code) {
  const half magnitude = as_type<half>(ushort((code & 7u) << 9)) * 16384.0h;
  return (code & 8u) ? -float(magnitude) : float(magnitude);
}

inline float bfloat_decode(uint bits) { return as_type<float>(bits << 16); }

// Round to nearest, ties to even; finite values.
inline ushort bfloat_encode(float x) {
  const uint bits = as_type<uint>(x);
  return ushort((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Exponent field of 2^ceil(log2(x)), x positive and normal: a non-zero mantissa carries over.
inline uint scale_code(float x) { return (as_type<uint>(x) + 0x7fffffu) >> 23; }

// Round to a small float format, ties to even; the range is the caller's to keep.
inline float small_round(float x, int lowest_exponent, uint n_mantissa) {
  const uint biased = max(as_type<uint>(fabs(x)) >> 23, uint(127 + lowest_exponent));
  const float step = as_type<float>((biased - n_mantissa) << 23);
  return rint(x / step) * step;
}

// Of a value that small_round made.
inline uint e4m3_encode(float x) {
  const uint bits = as_type<uint>(x);
  const float magnitude = fabs(x);
  const uint code = magnitude < 1.0f / 64.0f ? uint(magnitude * 512.0f)
                                        : ((bits & 0x7fffffffu) >> 20) - ((127u - 7u) << 3);
  return code | ((bits >> 24) & 0x80u);
}

inline uint e2m1_encode(float x) {
  const uint bits = as_type<uint>(x);
  const float magnitude = fabs(x);
  const uint code = magnitude < 1.0f ? uint(magnitude * 2.0f)
                                     : ((bits & 0x7fffffffu) >> 22) - ((127u - 1u) << 1);
  return code | ((bits >> 28) & 8u);
}

// One FP8 block, a pair of channels in each of 32 lanes: writes 64 bytes and their scale.
inline void fp8_block_store(device uint8_t* row, uint nope, uint block, uint lane, float2 x) {
  const float amax = max(simd_max(max(fabs(x.x), fabs(x.y))), 1e-4f);
  const uint code = scale_code(amax / FP8_MAX);
  const float2 y = clamp(x / e8m0_decode(code), float2(-FP8_MAX), float2(FP8_MAX));
  const uint low = e4m3_encode(small_round(y.x, -6, 3));
  const uint high = e4m3_encode(small_round(y.y, -6, 3));
  *(device ushort*)(row + block * FP8_BLOCK + 2 * lane) = ushort(low | (high << 8));
  if (lane == 0) row[nope + block] = uint8_t(code);
}

// Block `block` of 64 channels of an attention row, rotated already.
template <typename T, int HD, int ROPE, bool PLAIN>
inline void attention_block_store(device uint8_t* row, uint block, uint lane, float2 x) {
  constexpr uint nope = HD - ROPE;
  if (PLAIN) {
    device T* values = (device T*)row + block * FP8_BLOCK + 2 * lane;
    values[0] = T(x.x);
    values[1] = T(x.y);
  } else if (block * FP8_BLOCK < nope) {
    fp8_block_store(row, nope, block, lane, x);
    if (attention_tail(nope) > nope + nope / FP8_BLOCK && block == 0 && lane == 0) {
      row[attention_tail(nope) - 1] = 0;
    }
  } else {
    device ushort* tail = (device ushort*)(row + attention_tail(nope));
    tail += block * FP8_BLOCK - nope + 2 * lane;
    tail[0] = bfloat_encode(x.x);
    tail[1] = bfloat_encode(x.y);
  }
}

template <typename T, int HD, int ROPE, bool PLAIN> constexpr uint attention_row_bytes() {
  return PLAIN ? HD * sizeof(T) : attention_tail(HD - ROPE) + 2 * ROPE;
}

template <typename T, int D, bool PLAIN> constexpr uint index_row_bytes() {
  return PLAIN ? D * sizeof(T) : D / 2 + D / FP4_BLOCK;
}

// The scale code of this lane's FP4 block, a pair of channels in each of 16 lanes.
inline uint fp4_block_code(float2 x) {
  float amax = max(fabs(x.x), fabs(x.y));
  for (ushort distance = 1; distance < FP4_BLOCK / 2; distance *= 2) {
    amax = max(amax, simd_shuffle_xor(amax, distance));
  }
  return scale_code(max(amax, FP4_MAX * FLT_MIN) / FP4_MAX);
}

inline float2 fp4_round(float2 x, float scale) {
  const float2 y = clamp(x / scale, float2(-FP4_MAX), float2(FP4_MAX));
  return float2(small_round(y.x, 0, 1), small_round(y.y, 0, 1));
}

// Channels 64*i + 2*lane and the next of an index row of d channels.
inline void fp4_pair_store(device uint8_t* row, uint d, uint i, uint lane, float2 x) {
  const uint code = fp4_block_code(x);
  const float2 y = fp4_round(x, e8m0_decode(code));
  row[32 * i + lane] = uint8_t(e2m1_encode(y.x) | (e2m1_encode(y.y) << 4));
  if (lane % 16 == 0) row[d / 2 + 2 * i + lane / 16] = uint8_t(code);
}

// N words from an address that is a multiple of 8, or else of 2, as rows of an odd number of pairs
// of bytes are.
template <int N, bool ALIGNED>
inline void load_words(const device uint8_t* from, thread uint* words) {
  if (ALIGNED) {
    MLX_MTL_PRAGMA_UNROLL
    for (uint i = 0; i < N; i += 2) {
      const uint2 pair = ((const device uint2*)from)[i / 2];
      words[i] = pair.x;
      words[i + 1] = pair.y;
    }
  } else {
    const device ushort* halves = (const device ushort*)from;
    MLX_MTL_PRAGMA_UNROLL
    for (uint i = 0; i < N; i++) words[i] = uint(halves[2 * i]) | (uint(halves[2 * i + 1]) << 16);
  }
}

// Sixteen channels of an attention row in eight pairs: channels 64*block + 16*part and on.
template <int HD, int ROPE, bool PLAIN, typename T>
inline void attention_pairs(const device uint8_t* row, uint block, uint part, thread float2* x) {
  constexpr uint nope = HD - ROPE;
  constexpr bool aligned = attention_row_bytes<T, HD, ROPE, PLAIN>() % 8 == 0;
  const uint first = block * FP8_BLOCK + 16 * part;
  if (PLAIN) {
    const device T* values = (const device T*)row + first;
    MLX_MTL_PRAGMA_UNROLL
    for (uint i = 0; i < 8; i++) x[i] = float2(float(values[2 * i]), float(values[2 * i + 1]));
  } else if (first < nope) {
    const float scale = e8m0_decode(row[nope + block]);
    uint codes[4];
    load_words<4, aligned>(row + first, codes);
    MLX_MTL_PRAGMA_UNROLL
    for (uint i = 0; i < 8; i++) {
      const uint pair = codes[i / 2] >> (16 * (i % 2));
      x[i] = float2(e4m3_decode(pair), e4m3_decode(pair >> 8)) * scale;
    }
  } else {
    uint bits[8];
    load_words<8, aligned>(row + attention_tail(nope) + 2 * (first - nope), bits);
    MLX_MTL_PRAGMA_UNROLL
    for (uint i = 0; i < 8; i++) {
      x[i] = float2(bfloat_decode(bits[i] & 0xffffu), bfloat_decode(bits[i] >> 16));
    }
  }
}
