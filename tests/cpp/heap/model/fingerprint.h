// 64-bit fingerprints of states, and a set of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace model {

// The folded product of wyhash (Wang Yi 2019), twice. Not symmetric in its arguments.
inline uint64_t mix64(uint64_t hash, uint64_t value) {
  __extension__ using Wide = unsigned __int128;
  const Wide first = static_cast<Wide>(hash ^ 0xA0761D6478BD642F) * (value ^ 0xE7037ED1A0B428DB);
  const Wide product = static_cast<Wide>(static_cast<uint64_t>(first) ^ 0xA0761D6478BD642F) *
                       (static_cast<uint64_t>(first >> 64) ^ 0xE7037ED1A0B428DB);
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// Open addressing; 0 marks a free place.
class FingerprintSet {
 public:
  // Returns whether it was new.
  bool insert(uint64_t fingerprint) {
    if (2 * ++count_ > places_.size()) grow();
    return place(fingerprint | 1);
  }

 private:
  bool place(uint64_t value) {
    for (size_t i = value >> shift_;; i = (i + 1) & (places_.size() - 1)) {
      if (places_[i] == value) return --count_, false;
      if (places_[i] != 0) continue;
      places_[i] = value;
      return true;
    }
  }

  void grow() {
    const std::vector<uint64_t> old = std::move(places_);
    --shift_;
    places_ = std::vector<uint64_t>(old.size() * 2);
    for (const uint64_t value : old) {
      if (value != 0) place(value);
    }
  }

  std::vector<uint64_t> places_ = std::vector<uint64_t>(1024);
  int shift_ = 64 - 10;
  size_t count_ = 0;
};

}  // namespace model
