"""The changed rules of mutants.py: what to replace in which header, and the test that must refuse the result."""

from __future__ import annotations

from dataclasses import dataclass

WORD, TREE, HEAP = "heap_word.h", "heap_tree.h", "indexed_heap.h"
MODEL, SINGLE, ATOMICS = "test_heap_model", "test_heap", "test_heap_word"
X86_ONLY = {"swap-without-lock", "swap-of-tag-in-steps"}  # the text that they replace is not compiled elsewhere


@dataclass(frozen=True)
class Change:
    header: str
    old: str
    new: str
    count: int = 1


@dataclass(frozen=True)
class Mutant:
    name: str
    meaning: str
    test: str
    changes: tuple[Change, ...]


def mutant(name: str, meaning: str, test: str, *changes: tuple[str, str, str] | tuple[str, str, str, int]) -> Mutant:
    return Mutant(name, meaning, test, tuple(Change(*change) for change in changes))


MUTANTS = [
    # The way up.
    mutant("two-tries", "a climber gives up after two failed swaps", MODEL, (TREE, "kTries = 3", "kTries = 2")),
    mutant("one-try", "a climber gives up after one failed swap", MODEL, (TREE, "kTries = 3", "kTries = 1")),
    mutant(
        "gives-up",
        "three failed swaps of a node, be it dirty or clean, end the climb",
        MODEL,
        (TREE, "return true;  // another thread's refresh", "return false;  // another thread's refresh"),
    ),
    mutant(
        "no-dirty-nodes",
        "a node that was lowered is not marked",
        MODEL,
        (TREE, "const uint64_t dirty = is_root ? 0 : lowers ? kDirty : seen.tag & kDirty;",
         "const uint64_t dirty = 0 * (is_root + lowers);"),
    ),
    mutant(
        "marks-not-inherited",
        "a node that was dirty and is not lowered loses its mark",
        MODEL,
        (TREE, "lowers ? kDirty : seen.tag & kDirty;", "lowers ? kDirty : 0;"),
    ),
    mutant(
        "stops-at-dirty",
        "a climb ends at an equal value, though the node is dirty",
        MODEL,
        (TREE, "return !equal || dirty != 0;", "return !equal;"),
    ),
    mutant(
        "marks-cleared-early",
        "a node's mark is cleared before the nodes above are refreshed",
        MODEL,
        (TREE, "        mode = Climb::kFull;\n",
         "        mode = Climb::kFull;\n        Atomics::compare_exchange_tag(node, next, next.tag & ~kDirty);\n"
         "        --marked.count;\n"),
    ),
    mutant(
        "marks-cleared-next-level",
        "a node's mark is cleared when the next level, not the last, is refreshed",
        MODEL,
        (TREE, "      if (!refresh(level, index, id, old_key, mode, marked, memory)) break;\n",
         "      const int below = marked.count;\n"
         "      if (!refresh(level, index, id, old_key, mode, marked, memory)) break;\n"
         "      for (int i = 0; i < below; ++i) {\n"
         "        Atomics::compare_exchange_tag(*marked.node[i], marked.word[i], marked.word[i].tag & ~kDirty);\n"
         "      }\n"),
    ),
    mutant(
        "no-bump",
        "a climb that finds its value ends without swapping it",
        MODEL,
        (TREE, "      const bool lowers",
         "      if (equal && mode == Climb::kFull && !is_dirty(seen)) return false;\n      const bool lowers"),
    ),
    mutant(
        "read-only-check",
        "no node is marked, and a climb goes on past equal values without swapping them",
        MODEL,
        (TREE, "      const bool lowers", "      if (equal) return true;\n      const bool lowers"),
        (TREE, "const uint64_t dirty = is_root ? 0 : lowers ? kDirty : seen.tag & kDirty;",
         "const uint64_t dirty = 0 * (is_root + lowers);"),
    ),
    mutant(
        "helper-without-bump",
        "a reader that settles another's leaf goes past equal values without swapping them",
        MODEL,
        (TREE, "enum class Climb { kFull, kChase, kHelp };", "enum class Climb { kFull, kRead, kChase, kHelp };"),
        (TREE, "  void settle(int64_t id) { climb<Climb::kFull>(id, 0); }\n",
         "  void settle(int64_t id) { climb<Climb::kFull>(id, 0); }\n"
         "  void settle_reading(int64_t id) { climb<Climb::kRead>(id, 0); }\n"),
        (TREE, "const bool for_copy = mode != Climb::kFull;",
         "const bool for_copy = mode == Climb::kChase || mode == Climb::kHelp;"),
        (TREE, "      const bool lowers",
         "      if (equal && mode == Climb::kRead) return true;\n      const bool lowers"),
        (TREE, "        mode = Climb::kFull;\n", "        if (mode != Climb::kRead) mode = Climb::kFull;\n"),
        (HEAP, "  void settle(HeapWord& leaf, int64_t id, HeapWord seen) {\n",
         "  void settle_reading(HeapWord& leaf, int64_t id, HeapWord seen) {\n    tree_.settle_reading(id);\n"
         "    Atomics::compare_exchange_tag(leaf, seen, seen.tag & ~Tree::kDirty);\n  }\n"
         "  void settle(HeapWord& leaf, int64_t id, HeapWord seen) {\n"),
        (HEAP, "        settle(leaf, id, seen);\n", "        settle_reading(leaf, id, seen);\n", 2),
    ),
    mutant(
        "children-first",
        "a refresh reads the children before the node",
        MODEL,
        (TREE, "      const HeapWord seen = Atomics::load(node);\n",
         "      const HeapWord smallest = smallest_child(level, index, id);\n"
         "      const HeapWord seen = Atomics::load(node);\n"),
        (TREE, "return mode == Climb::kHelp;\n      const HeapWord smallest = smallest_child(level, index, id);\n",
         "return mode == Climb::kHelp;\n"),
    ),
    mutant(
        "frozen-node-versions",
        "a node keeps its version",
        MODEL,
        (TREE, "(seen.tag + kNodeVersion)", "seen.tag"),
    ),
    mutant(
        "same-by-key",
        "a node is equal to its smallest child when the keys are",
        MODEL,
        (TREE, "return a.key == b.key && (a.tag ^ b.tag) >> id_shift_ == 0;", "return a.key == b.key;"),
    ),
    mutant(
        "holds-by-key",
        "a node holds a copy when the keys are equal",
        MODEL,
        (TREE, "return node.key == key && id_of(node) == id;", "return id + 1 != 0 && node.key == key;"),
    ),
    mutant(
        "last-of-equal-leaves",
        "of equal leaves the last is the smallest",
        MODEL,
        (TREE, "const bool wins = other < key;", "const bool wins = other <= key;"),
    ),
    mutant(
        "nodes-by-key",
        "nodes are compared by key alone",
        SINGLE,
        (TREE, "return NativeAtomics::join(a) < NativeAtomics::join(b);", "return a.key < b.key;"),
    ),
    mutant(
        "marks-never-cleared",
        "a climb leaves its marks",
        SINGLE,
        (TREE, "Atomics::compare_exchange_tag(*marked.node[marked.count], word, word.tag & ~kDirty);", "(void)word;"),
    ),
    # Stale copies.
    mutant(
        "help-stops-early",
        "help ends at an equal value, as a climb with a value of its own does",
        MODEL,
        (TREE, "climb<Climb::kHelp>", "climb<Climb::kFull>"),
    ),
    mutant(
        "help-as-chase",
        "help ends at the first node without the copy",
        MODEL,
        (TREE, "climb<Climb::kHelp>", "climb<Climb::kChase>"),
    ),
    mutant(
        "copy-lowered",
        "a chase or help that leaves a node dirty goes on as before",
        MODEL,
        (TREE, "        mode = Climb::kFull;\n", ""),
    ),
    mutant(
        "no-chase",
        "take leaves the copies of the key",
        SINGLE,
        (HEAP, "kAbsent})) return false;\n    tree_.chase(id, seen.key);\n",
         "kAbsent})) return false;\n    (void)id;\n"),
    ),
    mutant(
        "no-chase-of-dirty",
        "take of a dirty leaf leaves the copies of the key",
        SINGLE,
        (HEAP, "kAbsent})) return false;\n    tree_.chase(id, seen.key);\n",
         "kAbsent})) return false;\n    if (!is_dirty(seen)) tree_.chase(id, seen.key);\n"),
    ),
    mutant(
        "chase-of-new-key",
        "an update that raises chases the new key",
        SINGLE,
        (HEAP, ": tree_.chase(id, seen.key);", ": tree_.chase(id, key);"),
    ),
    # Leaves.
    mutant(
        "lowered-leaf-clean",
        "a lowered leaf is not marked until it is settled",
        MODEL,
        (HEAP, "const HeapWord next = {next_tag(seen) | dirty, key};", "const HeapWord next = {next_tag(seen), key};"),
    ),
    mutant(
        "raised-leaf-clean",
        "a dirty leaf that is raised loses its mark",
        MODEL,
        (HEAP, "key < seen.key ? Tree::kDirty : seen.tag & Tree::kDirty;", "key < seen.key ? Tree::kDirty : 0;"),
    ),
    mutant(
        "cleared-before-settling",
        "a leaf's mark is cleared before its key is brought up",
        MODEL,
        (HEAP, "    tree_.settle(id);\n    Atomics::compare_exchange_tag(leaf, seen, seen.tag & ~Tree::kDirty);\n",
         "    Atomics::compare_exchange_tag(leaf, seen, seen.tag & ~Tree::kDirty);\n    tree_.settle(id);\n"),
    ),
    mutant(
        "leaf-marks-never-cleared",
        "a settled leaf keeps its mark",
        MODEL,
        (HEAP, "    tree_.settle(id);\n    Atomics::compare_exchange_tag(leaf, seen, seen.tag & ~Tree::kDirty);\n",
         "    tree_.settle(id);\n    (void)leaf, (void)seen;\n"),
    ),
    mutant(
        "frozen-leaf-versions",
        "a leaf keeps its version when it is changed",
        MODEL,
        (HEAP, "return (leaf.tag + Tree::kLeafVersion) & ~kFlags;", "return leaf.tag & ~kFlags;"),
    ),
    mutant(
        "kept-claim",
        "a claim outlasts a change of the leaf",
        SINGLE,
        (HEAP, "return (leaf.tag + Tree::kLeafVersion) & ~kFlags;",
         "return (leaf.tag + Tree::kLeafVersion) & ~Tree::kDirty;"),
    ),
    mutant(
        "frozen-versions",
        "no word's version changes",
        MODEL,
        (TREE, "(seen.tag + kNodeVersion)", "seen.tag"),
        (HEAP, "return (leaf.tag + Tree::kLeafVersion) & ~kFlags;", "return leaf.tag & ~kFlags;"),
        (HEAP, "(seen.tag & ~Tree::kClaim) + Tree::kLeafVersion", "seen.tag & ~Tree::kClaim"),
    ),
    mutant(
        "push-believes-present",
        "push of an id that looks present does not ask whether it is",
        MODEL,
        (HEAP, "        if (contains(id)) return true;\n        continue;\n", "        return true;\n"),
    ),
    # pop.
    mutant(
        "pop-without-reread",
        "pop takes a claimed leaf without a second load of the root",
        MODEL,
        (HEAP, "      if (!tree_.holds(Atomics::load(tree_.root()), root.key, id)) continue;\n", ""),
    ),
    mutant(
        "no-claim",
        "pop does not claim the leaf",
        MODEL,
        (HEAP,
         "        if (!Atomics::compare_exchange_tag(leaf, seen, claimed)) continue;\n        seen.tag = claimed;\n",
         "        (void)claimed;\n"),
    ),
    mutant(
        "pop-without-help",
        "pop starts over when it meets a stale root",
        MODEL,
        (HEAP, "if (!Atomics::changes_soon(tree_.root(), root)) tree_.help(id, root.key);\n", ""),
    ),
    mutant(
        "pop-of-changed-leaf",
        "pop takes the leaf that the root names, whatever its key",
        MODEL,
        (HEAP, "      if (seen.key != root.key) {\n        if (!Atomics::changes_soon",
         "      if (seen.key == kAbsent) {\n        if (!Atomics::changes_soon"),
    ),
    # priority.
    mutant(
        "priority-believes-claimed",
        "priority believes a claimed leaf",
        MODEL,
        (HEAP, "      if (is_claimed(seen)) {\n        // A pop", "      if (false) {\n        // A pop"),
    ),
    mutant(
        "priority-without-second-load",
        "priority believes a claimed leaf that the root names, without a second load of the leaf",
        MODEL,
        (HEAP, "          if (Atomics::load(leaf) != seen) continue;\n", ""),
    ),
    mutant(
        "unclaim-without-version",
        "priority takes a claim away and leaves the version",
        MODEL,
        (HEAP, "(seen.tag & ~Tree::kClaim) + Tree::kLeafVersion", "seen.tag & ~Tree::kClaim"),
    ),
    mutant(
        "priority-believes-dirty",
        "priority believes a dirty leaf",
        MODEL,
        (HEAP, "      if (is_dirty(seen)) {\n", "      if (false) {\n"),
    ),
    # peek.
    mutant(
        "peek-without-second-load",
        "peek does not load the root a second time",
        MODEL,
        (HEAP, "} else if (tree_.holds(Atomics::load(tree_.root()), root.key, id)) {\n        return HeapEntry",
         "} else {\n        return HeapEntry"),
    ),
    mutant(
        "peek-without-settling",
        "peek believes a dirty leaf",
        MODEL,
        (HEAP, "} else if (is_dirty(seen)) {", "} else if (false) {"),
    ),
    mutant(
        "peek-without-help",
        "peek starts over when it meets a stale root",
        MODEL,
        (HEAP, "        tree_.help(id, root.key);\n      } else if (is_dirty", "      } else if (is_dirty"),
    ),
    # The atomic word.
    mutant(
        "load-without-second-tag",
        "a load reads tag and key once",
        ATOMICS,
        (WORD, "if (__builtin_expect(__atomic_load_n(&word.tag, __ATOMIC_SEQ_CST) == tag, 1)) return", "return"),
    ),
    mutant(
        "swap-without-lock",
        "the 16-byte compare-and-swap is not locked",
        ATOMICS,
        (WORD, '"lock cmpxchg16b', '"cmpxchg16b'),
    ),
    mutant(
        "swap-of-tag-in-steps",
        "the compare-and-swap of the tag is a load and a store",
        ATOMICS,
        (WORD,
         "    return __atomic_compare_exchange_n(&word.tag, &expected.tag, tag, false, __ATOMIC_SEQ_CST, "
         "__ATOMIC_SEQ_CST);\n",
         "    if (__atomic_load_n(&word.tag, __ATOMIC_SEQ_CST) != expected.tag) return false;\n"
         "    __atomic_store_n(&word.tag, tag, __ATOMIC_SEQ_CST);\n    return true;\n"),
    ),
    mutant(
        "wait-always-says-changed",
        "changes_soon says that a word changed which did not",
        ATOMICS,
        (WORD, "    return false;\n  }\n  static constexpr int kWaits",
         "    return true;\n  }\n  static constexpr int kWaits"),
    ),
]  # fmt: skip
