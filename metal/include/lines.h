// Weights are read in 16-byte words and whole lines of 128 bytes, whatever the format's blocks are.

enum { LINE = 128 };

inline ulong line_of(ulong at) { return at & ~ulong(LINE - 1); }

// Weights as the kernel got them: 16-byte words of an array of `size` bytes, and where the rows of
// this tile start.
template <int M> struct weight_rows {
  device const uint4* words[M];
  ulong size[M];
  ulong start[M];
};

// The 16 bytes from `at`, a multiple of 16, on; what is beyond the array's end is 0.
inline uint4 word_of_16(device const uint4* words, ulong size, ulong at) {
  if (at + 16 <= size) return words[at >> 4];
  uint4 tail = uint4(0, 0, 0, 0);
  device const uchar* bytes = (device const uchar*)words;
  for (uint j = 0; at + j < size; j++) tail[j >> 2] |= uint(bytes[at + j]) << (8 * (j & 3));
  return tail;
}
