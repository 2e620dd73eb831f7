// Which activation rows share an expert's weights.
//
// Entry e of a step is the pair (row e / KTOP, its choice e % KTOP); the first row that chose a
// slot brings it, for all rows that did. A row's choices are distinct.

// Place s * (KTOP + 1) + j of row s's choice j among rows' choices and shared expert; at most S. 0
// where an earlier row brings the slot. Every thread gets the count; `places` is complete after the
// next threadgroup barrier.
template <int S, int KTOP>
inline int share_slot(threadgroup const int* chosen, int entry, threadgroup int* places,
                      bool writes) {
  int slot = chosen[entry], row = entry / KTOP, n = 0;
  for (int e = 0; e < row * KTOP; e++) {
    if (chosen[e] == slot) return 0;
  }
  for (int e = row * KTOP; e < S * KTOP; e++) {
    if (chosen[e] == slot && (e == entry || e / KTOP > row) && n < S) {
      if (writes) places[n] = e / KTOP * (KTOP + 1) + e % KTOP;
      n++;
    }
  }
  return n;
}
