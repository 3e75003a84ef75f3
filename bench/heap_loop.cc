// What bench/queues_report.py holds update_many against: the same updates in a C++ loop, called through ctypes.
#include <cstdint>

#include "foveal/indexed_heap.h"

extern "C" {

void* heap_new(const int64_t* ids, const double* priorities, int64_t count) {
  auto* heap = new foveal::IndexedHeap(count);
  heap->assign({ids, static_cast<size_t>(count)}, {priorities, static_cast<size_t>(count)});
  return heap;
}

void heap_update(void* heap, const int64_t* ids, const double* priorities, int64_t count) {
  auto* of = static_cast<foveal::IndexedHeap*>(heap);
  for (int64_t i = 0; i < count; ++i) of->update(ids[i], priorities[i]);
}

int64_t heap_pop(void* heap) { return static_cast<foveal::IndexedHeap*>(heap)->pop()->id; }
}
