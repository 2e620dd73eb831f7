// How a simdgroup's lanes hold an 8 x 8 matrix: row tile_row(lane), columns tile_column(lane) and
// the next, in thread_elements()[0] and [1]. MLX's own steel kernels rest on the same layout.

inline uint tile_row(uint lane) { return ((lane >> 2) & 4u) + ((lane >> 1) & 3u); }
inline uint tile_column(uint lane) { return ((lane >> 2) & 2u) * 2 + (lane & 1u) * 2; }
