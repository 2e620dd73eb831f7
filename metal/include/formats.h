// Weight formats. A matrix is one array of bytes, a row of it a run of blocks; ggml's formats lie
// as ggml lays them out, F32, F16 and BF16 are plain, and an FP8 block is an E8M0 scale and its 128
// E4M3 bytes, fewer at the end of a row.
//
// Everything is read in octets: eight consecutive values of a row. A unit of 256 values is 32
// octets, one for each lane, so that lanes read neighbouring bytes of the weights and neighbouring
// activations whatever the format. An octet never straddles two scales.

// GGUF's numbers of the types; FP8 is not among them.
enum {
  FORMAT_F32 = 0,
  FORMAT_F16 = 1,
  FORMAT_Q8_0 = 8,
  FORMAT_Q2_K = 10,
  FORMAT_Q4_K = 12,
  FORMAT_Q6_K = 14,
  FORMAT_IQ2_XXS = 16,
  FORMAT_BF16 = 30,
  FORMAT_MXFP4 = 39,
  FORMAT_FP8 = 128
};

constexpr int smaller(int a, int b) { return a < b ? a : b; }

constexpr int block_values(int format) {
  return format == FORMAT_Q8_0 || format == FORMAT_MXFP4 ? 32
      : format == FORMAT_Q2_K || format == FORMAT_Q4_K || format == FORMAT_Q6_K ||
          format == FORMAT_IQ2_XXS
      ? 256
      : format == FORMAT_FP8 ? 128
                             : 1;
}

constexpr int block_bytes(int format) {
  return format == FORMAT_F32 ? 4
      : format == FORMAT_F16 || format == FORMAT_BF16 ? 2
      : format == FORMAT_Q8_0 ? 34
      : format == FORMAT_Q2_K ? 84
      : format == FORMAT_Q4_K ? 144
      : format == FORMAT_Q6_K ? 210
      : format == FORMAT_IQ2_XXS ? 66
      : format == FORMAT_MXFP4 ? 17
                               : 129;
}

// Bytes of the first k values of a row; k is whole blocks, but for FP8.
constexpr int row_bytes(int format, int k) {
  return format == FORMAT_FP8 ? k + (k + 127) / 128
                              : k / block_values(format) * block_bytes(format);
}

// Whether a value is scale * number - least.
constexpr bool has_least(int format) { return format == FORMAT_Q2_K || format == FORMAT_Q4_K; }

// The 256 points of IQ2_XXS, two bits a coordinate, the first lowest.
// Source: ggml's format (MIT licence); a test holds them equal to the decoder's table.
constant ushort IQ2_XXS_POINTS[256] = {
  0x0000, 0x0002, 0x0005, 0x0008, 0x000a, 0x0011, 0x0014, 0x0020,
  0x0022, 0x0028, 0x002a, 0x0041, 0x0044, 0x0050, 0x0058, 0x0061,
  0x0064, 0x0080, 0x0082, 0x008a, 0x00a2, 0x0101, 0x0104, 0x0110,
  0x0115, 0x0140, 0x0184, 0x0198, 0x0200, 0x0202, 0x0222, 0x0282,
  0x0401, 0x0404, 0x0410, 0x0421, 0x0424, 0x0440, 0x0442, 0x0448,
  0x0460, 0x0481, 0x0484, 0x0490, 0x04a4, 0x0500, 0x0502, 0x0508,
  0x0520, 0x0546, 0x0569, 0x0580, 0x0591, 0x0609, 0x0610, 0x0640,
  0x0684, 0x06a4, 0x0800, 0x0805, 0x0808, 0x0814, 0x0828, 0x0841,
  0x0844, 0x0850, 0x0852, 0x0888, 0x0904, 0x0940, 0x0a02, 0x0a14,
  0x1001, 0x1004, 0x1010, 0x1021, 0x1040, 0x1060, 0x1084, 0x1090,
  0x1095, 0x1100, 0x1108, 0x1120, 0x1150, 0x115a, 0x1180, 0x1224,
  0x1245, 0x1400, 0x1408, 0x1420, 0x1425, 0x1449, 0x1480, 0x1518,
  0x1562, 0x1600, 0x1616, 0x1801, 0x1804, 0x1810, 0x1840, 0x1881,
  0x1900, 0x1905, 0x19a0, 0x1a51, 0x2000, 0x2002, 0x200a, 0x2044,
  0x2061, 0x2080, 0x2082, 0x2129, 0x2148, 0x2200, 0x2202, 0x2401,
  0x2404, 0x2410, 0x2440, 0x2456, 0x2500, 0x2541, 0x2564, 0x2690,
  0x2808, 0x2820, 0x2894, 0x2a44, 0x4001, 0x4004, 0x4010, 0x4018,
  0x4021, 0x4024, 0x4040, 0x4048, 0x4056, 0x4060, 0x4081, 0x4084,
  0x4090, 0x4100, 0x4120, 0x4161, 0x4180, 0x4185, 0x4201, 0x4210,
  0x4248, 0x4256, 0x4268, 0x4400, 0x4408, 0x4420, 0x4480, 0x4499,
  0x4512, 0x4524, 0x4600, 0x4801, 0x4804, 0x4810, 0x4840, 0x4845,
  0x4900, 0x4958, 0x4961, 0x4982, 0x4a45, 0x4a90, 0x5000, 0x5008,
  0x5011, 0x5019, 0x5020, 0x5080, 0x5088, 0x5104, 0x5142, 0x51a4,
  0x5291, 0x5490, 0x5492, 0x550a, 0x5601, 0x5654, 0x5800, 0x5811,
  0x5819, 0x5864, 0x5940, 0x5a08, 0x6004, 0x6010, 0x6040, 0x6068,
  0x6100, 0x6155, 0x6218, 0x6260, 0x6400, 0x6405, 0x6510, 0x6512,
  0x6584, 0x6842, 0x8000, 0x8002, 0x800a, 0x8041, 0x8082, 0x8104,
  0x8118, 0x8140, 0x8211, 0x8401, 0x8404, 0x8410, 0x8415, 0x8440,
  0x8460, 0x8500, 0x8546, 0x8594, 0x8609, 0x8640, 0x8660, 0x8802,
  0x8904, 0x8a11, 0x9004, 0x9010, 0x9024, 0x9040, 0x90a1, 0x9116,
  0x9180, 0x9245, 0x9400, 0x9422, 0x9444, 0x9551, 0x9881, 0x9920,
  0xa002, 0xa050, 0xa085, 0xa109, 0xa200, 0xa418, 0xa850, 0xa904
};

// Coordinates 8, 25 and 43 of a point as bytes. 512 bytes of table become 2 KiB of threadgroup
// memory once, because `constant` memory serves lanes that ask for different places one by one.
inline uint2 iq2_xxs_point(uint i) {
  uint codes = IQ2_XXS_POINTS[i];
  uint2 bytes = uint2(0, 0);
  for (uint j = 0; j < 4; j++) {
    uint a = (codes >> (2 * j)) & 3, b = (codes >> (2 * j + 8)) & 3;
    bytes.x |= (8 + 17 * a + (a >> 1)) << (8 * j);
    bytes.y |= (8 + 17 * b + (b >> 1)) << (8 * j);
  }
  return bytes;
}

// Eight values: scale * (lo, hi) - least.
struct octet {
  float4 lo;
  float4 hi;
  float scale;
  float least;
};

// Bytes are read as words of threadgroup or device memory; P is the pointer to those.
template <typename P>
inline uint byte_at(P words, uint at) { return (words[at >> 2] >> (8 * (at & 3))) & 255; }

// An even `at`.
template <typename P>
inline float half_at(P words, uint at) {
  return float(as_type<half>(ushort(words[at >> 2] >> (8 * (at & 2)))));
}

// Four bytes at any place. The second word is read only if the first does not hold them all, so
// that nothing beyond them is touched.
template <typename P>
inline uint word_at(P words, uint at) {
  uint shift = 8 * (at & 3);
  uint a = words[at >> 2], b = words[(at + 3) >> 2];
  return (a >> shift) | ((b << 1) << (31 - shift));
}

// Eight bytes at any place.
template <typename P>
inline uint2 words_at(P words, uint at) {
  uint shift = 8 * (at & 3);
  uint a = words[at >> 2], b = words[(at >> 2) + 1], c = words[(at + 7) >> 2];
  return uint2((a >> shift) | ((b << 1) << (31 - shift)),
               (b >> shift) | ((c << 1) << (31 - shift)));
}

inline float4 unsigned_bytes(uint word) { return float4(as_type<uchar4>(word)); }
inline float4 signed_bytes(uint word) { return float4(as_type<char4>(word)); }

// Two words that hold the halves 0, 2 and 1, 3.
inline float4 halves(uint even, uint odd) {
  half2 a = as_type<half2>(even), b = as_type<half2>(odd);
  return float4(float(a.x), float(b.x), float(a.y), float(b.y));
}

// E2M1 in the low nibbles of four bytes, times 2^-14: its exponent and mantissa are a half's, but
// for the bias.
inline float4 e2m1(uint word) {
  uint even = ((word & 0x00070007u) << 9) | ((word & 0x00080008u) << 12);
  word >>= 8;
  return halves(even, ((word & 0x00070007u) << 9) | ((word & 0x00080008u) << 12));
}

// E4M3 in four bytes, times 2^-8. NaN, which no weight holds, becomes 480.
inline float4 e4m3(uint word) {
  uint even = ((word & 0x007f007fu) << 7) | ((word & 0x00800080u) << 8);
  word >>= 8;
  return halves(even, ((word & 0x007f007fu) << 7) | ((word & 0x00800080u) << 8));
}

inline float e8m0(uint byte) { return as_type<float>(byte ? byte << 23 : 0x00400000u); }

inline float4 with_signs(float4 x, uint signs) {
  return float4(signs & 1 ? -x.x : x.x, signs & 2 ? -x.y : x.y, signs & 4 ? -x.z : x.z,
                signs & 8 ? -x.w : x.w);
}

// Octet `l` (0..31) of the unit whose bytes begin at `at`; `points` are IQ2_XXS's. MXFP4 scales
// from 2^114 and FP8 scales from 2^120 on become infinite, because the power of two above is
// multiplied into them.
template <int F, typename P>
inline octet octet_at(P words, uint at, uint l, threadgroup const uint2* points) {
  octet o;
  o.scale = 1.0f;
  o.least = 0.0f;
  uint quarter = l & 3;  // of 32 values
  if (F == FORMAT_F32) {
    uint w = (at >> 2) + 8 * l;
    o.lo = float4(as_type<float>(words[w]), as_type<float>(words[w + 1]),
                  as_type<float>(words[w + 2]), as_type<float>(words[w + 3]));
    o.hi = float4(as_type<float>(words[w + 4]), as_type<float>(words[w + 5]),
                  as_type<float>(words[w + 6]), as_type<float>(words[w + 7]));
  } else if (F == FORMAT_F16) {
    uint w = (at >> 2) + 4 * l;
    half2 a = as_type<half2>(words[w]), b = as_type<half2>(words[w + 1]);
    half2 c = as_type<half2>(words[w + 2]), d = as_type<half2>(words[w + 3]);
    o.lo = float4(float(a.x), float(a.y), float(b.x), float(b.y));
    o.hi = float4(float(c.x), float(c.y), float(d.x), float(d.y));
  } else if (F == FORMAT_BF16) {
    uint w = (at >> 2) + 4 * l;
    uint a = words[w], b = words[w + 1], c = words[w + 2], d = words[w + 3];
    o.lo = float4(as_type<float>(a << 16), as_type<float>(a & 0xffff0000u),
                  as_type<float>(b << 16), as_type<float>(b & 0xffff0000u));
    o.hi = float4(as_type<float>(c << 16), as_type<float>(c & 0xffff0000u),
                  as_type<float>(d << 16), as_type<float>(d & 0xffff0000u));
  } else if (F == FORMAT_FP8) {
    uint block = at + 129 * (l >> 4);
    uint2 q = words_at(words, block + 1 + 8 * (l & 15));
    o.lo = e4m3(q.x);
    o.hi = e4m3(q.y);
    o.scale = 256.0f * e8m0(byte_at(words, block));
  } else if (F == FORMAT_Q8_0) {
    uint block = at + 34 * (l >> 2);
    uint2 q = words_at(words, block + 2 + 8 * quarter);
    o.lo = signed_bytes(q.x);
    o.hi = signed_bytes(q.y);
    o.scale = half_at(words, block);
  } else if (F == FORMAT_MXFP4) {  // the low nibbles of 16 bytes, then their high nibbles
    uint block = at + 17 * (l >> 2);
    uint2 q = words_at(words, block + 1 + 8 * (quarter & 1)) >> (4 * (quarter >> 1));
    o.lo = e2m1(q.x);
    o.hi = e2m1(q.y);
    o.scale = 16384.0f * e8m0(byte_at(words, block));
  } else if (F == FORMAT_Q2_K) {  // four lanes share eight bytes, two bits each
    uint half_block = l >> 4, pair = (l >> 2) & 3, w = at >> 2;
    uint from = w + 4 + 8 * half_block + 2 * quarter;
    o.lo = unsigned_bytes((words[from] >> (2 * pair)) & 0x03030303u);
    o.hi = unsigned_bytes((words[from + 1] >> (2 * pair)) & 0x03030303u);
    uint scale = byte_at(words, at + 8 * half_block + 2 * pair + (quarter >> 1));
    half2 d = as_type<half2>(words[w + 20]);
    o.scale = float(d.x) * float(scale & 15);
    o.least = float(d.y) * float(scale >> 4);
  } else if (F == FORMAT_Q4_K) {
    uint run = l >> 2, w = at >> 2, shift = 8 * (run & 3);
    uint from = w + 4 + 8 * (run >> 1) + 2 * quarter;
    o.lo = unsigned_bytes((words[from] >> (4 * (run & 1))) & 0x0f0f0f0fu);
    o.hi = unsigned_bytes((words[from + 1] >> (4 * (run & 1))) & 0x0f0f0f0fu);
    half2 d = as_type<half2>(words[w]);
    uint a = words[w + 1] >> shift, b = words[w + 2] >> shift, c = words[w + 3] >> shift;
    o.scale = float(d.x) * float(run < 4 ? a & 63 : (c & 15) | ((a >> 2) & 48));
    o.least = float(d.y) * float(run < 4 ? b & 63 : ((c >> 4) & 15) | ((b >> 2) & 48));
  } else if (F == FORMAT_Q6_K) {
    uint half_block = l >> 4, pair = (l >> 2) & 3;
    uint2 low = words_at(words, at + 64 * half_block + 32 * (pair & 1) + 8 * quarter);
    uint2 high = words_at(words, at + 128 + 32 * half_block + 8 * quarter);
    low = (low >> (4 * (pair >> 1))) & 0x0f0f0f0fu;
    high = ((high >> (2 * pair)) & 0x03030303u) << 4;
    o.lo = unsigned_bytes(low.x | high.x) - 32.0f;
    o.hi = unsigned_bytes(low.y | high.y) - 32.0f;
    uint scale = byte_at(words, at + 192 + 8 * half_block + 2 * pair + (quarter >> 1));
    o.scale = half_at(words, at + 208) * float(as_type<char>(uchar(scale)));
  } else if (F == FORMAT_IQ2_XXS) {  // an octet is a point with eight signs, seven of them stored
    uint group = at + 2 + 8 * (l >> 2);
    uint2 point = points[byte_at(words, group + quarter)];
    uint word = word_at(words, group + 4);
    uint signs = (word >> (7 * quarter)) & 127;
    signs |= (popcount(signs) & 1) << 7;
    o.lo = with_signs(unsigned_bytes(point.x), signs);
    o.hi = with_signs(unsigned_bytes(point.y), signs >> 4);
    o.scale = half_at(words, at) * (float(word >> 28) + 0.5f) * 0.25f;
  }
  return o;
}

// sum of w * x, always in this order.
inline float octet_dot(octet w, float4 a, float4 b) {
  float x = w.lo.x * a.x, y = w.hi.x * b.x;
  x = fma(w.lo.y, a.y, x);
  y = fma(w.hi.y, b.y, y);
  x = fma(w.lo.z, a.z, x);
  y = fma(w.hi.z, b.z, y);
  x = fma(w.lo.w, a.w, x);
  y = fma(w.hi.w, b.w, y);
  return x + y;
}
