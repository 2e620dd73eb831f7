// inputs: place unread old part_00 part_01 part_02 part_03 part_04 part_05 part_06 part_07 part_08 part_09 part_10 part_11 part_12 part_13 part_14 part_15 part_16 part_17 part_18 part_19 part_20 part_21 part_22 part_23
// outputs: stacked
// What a commit keeps of up to 24 layers, in one launch: the last rows of old [layers, OLD, row]
// followed by each layer's new ones, part_i [S, row] -> [parts, kept, row]. place[0] is part_00's
// layer in `old`, place[1] how many new rows to take; a plain stack has OLD 0. The first unread[0]
// of a layer's rows become zeros: of tokens whose window has closed nothing is needed any more, and
// for windows of 128 tokens that is half of what there is, on average. Metal binds at most 31
// arrays, hence 24; names beyond the parts are bound to any array. Templates: U (a word of a row),
// WORDS (per row), OLD.
//
// A thread copies one word; the layer is the grid's z, so a whole threadgroup takes one case.

// body
const uint word = thread_position_in_grid.x;
const uint layer = thread_position_in_grid.z;
const device U* fresh;
switch (layer) {
  case 0: fresh = (const device U*)part_00; break;
  case 1: fresh = (const device U*)part_01; break;
  case 2: fresh = (const device U*)part_02; break;
  case 3: fresh = (const device U*)part_03; break;
  case 4: fresh = (const device U*)part_04; break;
  case 5: fresh = (const device U*)part_05; break;
  case 6: fresh = (const device U*)part_06; break;
  case 7: fresh = (const device U*)part_07; break;
  case 8: fresh = (const device U*)part_08; break;
  case 9: fresh = (const device U*)part_09; break;
  case 10: fresh = (const device U*)part_10; break;
  case 11: fresh = (const device U*)part_11; break;
  case 12: fresh = (const device U*)part_12; break;
  case 13: fresh = (const device U*)part_13; break;
  case 14: fresh = (const device U*)part_14; break;
  case 15: fresh = (const device U*)part_15; break;
  case 16: fresh = (const device U*)part_16; break;
  case 17: fresh = (const device U*)part_17; break;
  case 18: fresh = (const device U*)part_18; break;
  case 19: fresh = (const device U*)part_19; break;
  case 20: fresh = (const device U*)part_20; break;
  case 21: fresh = (const device U*)part_21; break;
  case 22: fresh = (const device U*)part_22; break;
  case 23: fresh = (const device U*)part_23; break;
  default: return;
}
const uint kept = threads_per_grid.y;
const uint row = OLD + uint(place[1]) - kept + thread_position_in_grid.y;
const size_t to = (size_t(layer) * kept + thread_position_in_grid.y) * WORDS + word;
((device U*)stacked)[to] = thread_position_in_grid.y < uint(unread[0]) ? U(0) : row < OLD
    ? ((const device U*)old)[((size_t(place[0]) + layer) * OLD + row) * WORDS + word]
    : fresh[size_t(row - OLD) * WORDS + word];
