// Python keys as dense ids, and back: the dict of a PriorityMap.
//
// Open addressing with linear probing over 8-byte slots, erased by shifting back (Knuth, TAOCP 6.4, algorithm R).
// Beside a dict of ints it saves the int objects and, for a key whose id is known, hashing and comparing: popitem runs
// no Python code at all.
//
// `find` can run Python code (__eq__), which can do anything to the table; it then begins anew. Nothing else here runs
// any. A removed key is handed to the caller, who drops it when the table is whole again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "bindings/gil.h"
#include "bindings/native_type.h"

namespace foveal {

class KeyTable {
 public:
  using Id = uint32_t;
  static constexpr Id kNone = UINT32_MAX;

  KeyTable() = default;
  KeyTable(const KeyTable& other) : slots_(other.slots_), nodes_(other.nodes_), free_(other.free_) {
    for (const Node& node : nodes_) Py_XINCREF(node.key);
  }
  KeyTable& operator=(const KeyTable&) = delete;
  ~KeyTable() {
    for (const Node& node : nodes_) Py_XDECREF(node.key);
  }

  size_t size() const { return nodes_.size() - free_.size(); }
  PyObject* key(Id id) const { return nodes_[id].key; }

  size_t nbytes() const {
    return slots_.capacity() * sizeof(Slot) + nodes_.capacity() * sizeof(Node) + free_.capacity() * sizeof(Id);
  }

  static Py_hash_t hash_of(PyObject* key) {
    const Py_hash_t hash = asking_for_gil([&] { return PyObject_Hash(key); });
    if (hash == -1) throw PythonError{};
    return hash;
  }

  // The id of a key that is equal to `key`, or kNone.
  Id find(PyObject* key, Py_hash_t hash) const {
    for (;;) {
      if (const std::optional<Id> found = find_undisturbed(key, hash)) return *found;
    }
  }

  // Takes a key in that `find` has just not found. Strong guarantee.
  Id insert(PyObject* key, Py_hash_t hash) {
    if (3 * (size() + 1) > 2 * slots_.size()) rehash();
    Id id = static_cast<Id>(nodes_.size());
    if (free_.empty()) {
      if (id == kNone) throw std::bad_alloc();
      nodes_.push_back({Py_NewRef(key), hash});
    } else {
      id = free_.back();
      free_.pop_back();
      nodes_[id] = {Py_NewRef(key), hash};
    }
    occupy({mix(hash), id});
    ++changes_;
    return id;
  }

  // Gives the reference to the key away.
  PyObject* erase(Id id) {
    free_.push_back(id);
    Node& node = nodes_[id];
    size_t hole = home(mix(node.hash));
    while (slots_[hole].id != id) hole = next(hole);
    for (size_t place = next(hole); slots_[place].id != kNone; place = next(place)) {
      // A slot may go to the hole if its home is not between the hole and itself.
      const size_t from_home = (place - home(slots_[place].mixed)) & (slots_.size() - 1);
      if (from_home < ((place - hole) & (slots_.size() - 1))) continue;
      slots_[hole] = slots_[place];
      hole = place;
    }
    slots_[hole].id = kNone;
    ++changes_;
    PyObject* key = node.key;
    node.key = nullptr;
    return key;
  }

  void swap(KeyTable& other) {
    slots_.swap(other.slots_);
    nodes_.swap(other.nodes_);
    free_.swap(other.free_);
    ++changes_;
    ++other.changes_;
  }

  // Calls visit(key, id) for each key until it returns something other than 0.
  template <class Visit>
  int for_each(Visit&& visit) const {
    for (size_t id = 0; id < nodes_.size(); ++id) {
      if (nodes_[id].key == nullptr) continue;
      if (const int stop = visit(nodes_[id].key, static_cast<Id>(id))) return stop;
    }
    return 0;
  }

 private:
  struct Slot {
    uint32_t mixed = 0;
    Id id = kNone;
  };
  struct Node {
    PyObject* key;  // null: the id is free
    Py_hash_t hash;
  };

  // Python's hashes of ints are the ints: multiplied (Knuth) so that the upper bits differ, which say where home is.
  static uint32_t mix(Py_hash_t hash) {
    return static_cast<uint32_t>((static_cast<uint64_t>(hash) * 0x9E3779B97F4A7C15) >> 32);
  }
  size_t home(uint32_t mixed) const { return static_cast<size_t>(uint64_t{mixed} * slots_.size() >> 32); }
  size_t next(size_t place) const { return (place + 1) & (slots_.size() - 1); }

  // None: a comparison changed the table.
  std::optional<Id> find_undisturbed(PyObject* key, Py_hash_t hash) const {
    if (slots_.empty()) return kNone;
    const uint32_t mixed = mix(hash);
    for (size_t place = home(mixed);; place = next(place)) {
      const Slot slot = slots_[place];
      if (slot.id == kNone) return kNone;
      if (slot.mixed != mixed) continue;
      const Node& node = nodes_[slot.id];
      if (node.key == key) return slot.id;
      if (node.hash != hash) continue;
      const uint64_t changes = changes_;
      PyObject* found = Py_NewRef(node.key);
      const int equal = asking_for_gil([&] { return PyObject_RichCompareBool(found, key, Py_EQ); });
      Py_DECREF(found);
      if (equal < 0) throw PythonError{};
      if (changes_ != changes) return std::nullopt;
      if (equal > 0) return slot.id;
    }
  }

  void occupy(Slot slot) {
    size_t place = home(slot.mixed);
    while (slots_[place].id != kNone) place = next(place);
    slots_[place] = slot;
  }

  void rehash() {
    std::vector<Slot> old(slots_.empty() ? 8 : 2 * slots_.size());
    free_.reserve(old.size());  // so that erase allocates nothing
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.id != kNone) occupy(slot);
    }
  }

  std::vector<Slot> slots_;  // as many as a power of two, at most two thirds in use
  std::vector<Node> nodes_;  // by id
  std::vector<Id> free_;
  uint64_t changes_ = 0;
};

}  // namespace foveal
