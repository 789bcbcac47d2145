// The Hopper kernels' own source (cuda/sm90), run on an imitated multiprocessor (machine.h) against attention written out pair by
// pair; and their schedule: every visible tile exactly once.
//
//   test_sm90          the tests, with lists made here
//   test_sm90 FILE     one problem with the lists that treegrpo_kernels.hopper_cuda makes, as tests/test_imitated.py writes them
#include "cuda/sm90/backward_dkv.h"
#include "cuda/sm90/backward_dq.h"
#include "cuda/sm90/elementwise.h"
#include "cuda/sm90/forward.h"

#include <algorithm>
#include <fstream>
#include <numeric>
#include <set>
#include <string>
#include <tuple>

#include "definition.h"
#include "machine.h"
#include "warp.h"

using namespace treegrpo;
using namespace treegrpo::test;
using sm90::Half;

constexpr float kLog2e = 1.4426950408889634f;

// The words Triton's compiler makes of the same tiles, in kernels that have run on a GPU: the address's 16-byte units lowest.
void check_descriptors() {
  using sm90::Major;
  const auto word = [](Major major, int panel, int step) {
    return sm90::descriptor(sm90::step_offset(major, step, panel), major, panel);
  };
  constexpr uint64_t kIgnored = 1 << 16;  // the leading offset, where the summed dimension lies along rows
  const uint64_t summed[] = {0x0, 0x2, 0x4, 0x6, 0x400, 0x402, 0x404, 0x406};
  for (int step = 0; step < 8; ++step) {
    EXPECT(word(Major::kSummed, 128 * 128, step) == (0x4000004000000000 | kIgnored | summed[step]), "step %d", step);
    EXPECT(word(Major::kOuter, 128 * 128, step) == 0x4000004004000000 + uint64_t(step) * 0x80, "step %d", step);
    EXPECT(word(Major::kOuter, 64 * 128, step) == 0x4000004002000000 + uint64_t(step) * 0x80, "step %d", step);
  }
}

// What TreePlan.tile_lists gives, made from the visibility of single tokens.
struct Tiles {
  int num_tokens = 0, rows = 0, keys = 0;
  std::vector<int32_t> offsets, indices, full, order, min_end, max_end;

  Tiles() = default;
  Tiles(const Forest& forest, int rows, int keys) : num_tokens(forest.size()), rows(rows), keys(keys) {
    const int num_rows = (num_tokens + rows - 1) / rows, num_keys = (num_tokens + keys - 1) / keys;
    for (int n = 0; n < num_keys; ++n) {
      min_end.push_back(n * keys + keys > num_tokens ? 0 : INT32_MAX), max_end.push_back(0);
      for (int j = n * keys; j < std::min(num_tokens, n * keys + keys); ++j) {
        min_end[n] = std::min(min_end[n], forest.subtree_end[j]), max_end[n] = std::max(max_end[n], forest.subtree_end[j]);
      }
    }
    offsets.push_back(0);
    for (int r = 0; r < num_rows; ++r) {
      std::vector<int32_t> whole, partial;
      for (int n = 0; n < num_keys; ++n) {
        // as in the plan, where rows past T spoil no full tile; keys past T do
        const Tile seen = meet(forest, r * rows, std::min(rows, num_tokens - r * rows), n * keys, keys);
        if (seen == Tile::kFull) whole.push_back(n);
        if (seen == Tile::kPartial) partial.push_back(n);
      }
      full.push_back(static_cast<int32_t>(whole.size()));
      indices.insert(indices.end(), whole.begin(), whole.end());
      indices.insert(indices.end(), partial.begin(), partial.end());
      offsets.push_back(static_cast<int32_t>(indices.size()));
    }
    order.resize(num_rows);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return length(a) > length(b); });
  }

  int length(int row_tile) const { return offsets[row_tile + 1] - offsets[row_tile]; }
  sm90::Lists lists() const { return {offsets.data(), indices.data(), full.data(), order.data()}; }

  // Rows or keys past T see nothing and are seen by nobody.
  static Tile meet(const Forest& forest, int row, int rows, int key, int keys) {
    int seen = 0;
    const int num_tokens = static_cast<int>(forest.size());
    for (int i = row; i < std::min(row + rows, num_tokens); ++i)
      for (int j = key; j < std::min(key + keys, num_tokens); ++j) seen += j <= i && i < forest.subtree_end[j];
    return seen == 0 ? Tile::kSkip : seen == rows * keys ? Tile::kFull : Tile::kPartial;
  }
};

// Key tiles of 128 and query tiles of 64; those longer than `longest` query tiles in pieces, as treegrpo_kernels.work parts them.
struct Items {
  std::vector<int32_t> items, half_min_end, half_max_end;
  std::vector<std::array<int, 3>> parted;  // key tile, first slot, how many
  int num_slots = 0;

  Items() = default;
  Items(const Forest& forest, const Tiles& tiles, int longest) {
    const Tiles halves(forest, 64, 64);
    half_min_end = halves.min_end, half_max_end = halves.max_end;
    half_min_end.push_back(0), half_max_end.push_back(0);
    std::vector<std::array<int32_t, 4>> made;
    for (int n = 0; n < static_cast<int>(tiles.max_end.size()); ++n) {
      const int low = n * tiles.keys / tiles.rows, high = (tiles.max_end[n] + tiles.rows - 1) / tiles.rows;
      const int pieces = high - low > longest ? (high - low + longest - 1) / longest : 1;
      if (pieces > 1) parted.push_back({n, num_slots, pieces});
      for (int piece = 0; piece < pieces; ++piece)
        made.push_back({n, low + piece * (high - low) / pieces, low + (piece + 1) * (high - low) / pieces,
                        pieces > 1 ? num_slots++ : -1});
    }
    std::stable_sort(made.begin(), made.end(), [](const auto& a, const auto& b) { return a[2] - a[1] > b[2] - b[1]; });
    for (const auto& item : made) items.insert(items.end(), item.begin(), item.end());
  }
  int count() const { return static_cast<int>(items.size() / 4); }
};

// What a plan tells the kernels.
struct Plan {
  Tiles fwd, dq, dkv;
  Items items;
  std::vector<int32_t> span;  // [Tp]

  Plan() = default;
  Plan(const Forest& forest, int longest)
      : fwd(forest, 128, 128), dq(forest, 128, 64), dkv(forest, 64, 128), items(forest, dkv, longest) {
    span.resize((forest.size() + 127) / 128 * 128, 0);
    for (int64_t j = 0; j < forest.size(); ++j) span[j] = forest.subtree_end[j] - static_cast<int32_t>(j);
  }
};

// Values rounded to the type: as the kernels read them, and as what the definition is fed with.
std::vector<uint16_t> rounded(Half type, std::vector<double>& x) {
  std::vector<uint16_t> words;
  for (double& value : x) words.push_back(narrow(type, static_cast<float>(value))), value = widen(type, words.back());
  return words;
}

std::vector<double> widened(Half type, const std::vector<uint16_t>& x) {
  std::vector<double> values;
  for (uint16_t word : x) values.push_back(widen(type, word));
  return values;
}

// Pairs of them for elementwise.h, and a lane of an imitated warp.
template <Half type>
struct Words {
  static sm90::Pair load(const void* values, int64_t at) {
    const auto* words = static_cast<const uint16_t*>(values) + at;
    return {widen(type, words[0]), widen(type, words[1])};
  }
  static void store(void* values, int64_t at, sm90::Pair x) {
    auto* words = static_cast<uint16_t*>(values) + at;
    words[0] = narrow(type, x.x), words[1] = narrow(type, x.y);
  }
};

struct Lane {
  int lane;
  Warp* warp;
  float sum(float x) const { return warp->sum(lane, x); }
};

// Largest deviation, measured against the largest value, or 1: a single token has no gradient of q.
void near(const char* what, const std::vector<double>& found, const std::vector<double>& wanted, double tolerance) {
  double scale = 1;
  for (double x : wanted) scale = std::max(scale, std::abs(x));
  for (size_t i = 0; i < wanted.size(); ++i)
    EXPECT(std::abs(found[i] - wanted[i]) <= tolerance * scale, "%s[%zu] = %.6g, not %.6g (largest %.3g)", what, i, found[i],
           wanted[i], scale);
}

template <class Program, class Params>
void launch(const Params& params, int num_bytes, int num_blocks, unsigned seed) {
  for (int block = 0; block < num_blocks; ++block) {
    Multiprocessor sm(num_bytes, block, num_blocks, seed + block);
    sm.run([&](Multiprocessor::Thread& thread) { Program::run(thread, params); });
  }
}

// bfloat16 has eight bits and float16 eleven; the sums of a few hundred terms in float32 add next to nothing.
constexpr double tolerance(Half type) { return type == Half::kBFloat16 ? 1.5e-2 : 2e-3; }

template <int D, Half type>
void check(const Forest& forest, int num_heads, int num_kv_heads, const Plan& plan, bool has_sinks, unsigned seed) {
  const int num_tokens = static_cast<int>(forest.size()), padded = (num_tokens + 127) / 128 * 128;
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  // sinks change the forward alone: the backward gets them with lse
  const Problem problem{{num_tokens, num_heads, num_kv_heads, D, D}, {scale, 0}, 0, has_sinks};
  Tensors x = inputs(problem, seed);
  auto q = rounded(type, x.q), k = rounded(type, x.k), v = rounded(type, x.v), dout = rounded(type, x.dout);
  const std::vector<float> sinks(x.sinks.begin(), x.sinks.end());
  by_definition(forest, problem, x);

  const auto map = [&](std::vector<uint16_t>& values, int heads, int box_rows) {
    return TensorMap{values.data(), num_tokens, heads * D, box_rows};
  };
  const std::vector<int32_t>& span = plan.span;
  const sm90::Sizes sizes{num_tokens, padded, num_heads, num_kv_heads};
  const uint16_t nan = narrow(type, NAN);

  const Tiles& fwd = plan.fwd;
  std::vector<uint16_t> out(q.size(), nan);
  std::vector<float> lse(num_tokens * num_heads, NAN);
  const int num_items = static_cast<int>(fwd.order.size()) * num_heads, num_blocks = std::min(num_items, 3);
  using Forward = sm90::Forward<Multiprocessor::Thread, D, type>;
  launch<Forward>(sm90::ForwardParams<TensorMap>{map(q, num_heads, 64), map(out, num_heads, 64), map(k, num_kv_heads, 128),
                                                 map(v, num_kv_heads, 128), fwd.lists(), span.data(), fwd.min_end.data(),
                                                 fwd.max_end.data(), has_sinks ? sinks.data() : nullptr, lse.data(), sizes, num_items,
                                                 scale * kLog2e},
                  sm90::ForwardMemory<D>::kBytes, num_blocks, seed);
  near("out", widened(type, out), x.out, tolerance(type));
  near("lse", std::vector<double>(lse.begin(), lse.end()), x.lse, 1e-4);

  std::vector<float> lse2(num_heads * padded, NAN), delta(num_heads * padded, NAN);
  sm90::BackwardCall call{};
  call.sizes = sizes, call.scale = scale, call.lse = lse.data(), call.lse2 = lse2.data(), call.delta = delta.data();
  call.out = {out.data(), num_heads * D}, call.dout = {dout.data(), num_heads * D};
  for (int h = 0; h < num_heads; ++h)
    for (int row = 0; row < padded; row += sm90::kRowsPerWarp) {
      Warp warp;
      warp.run([&](int lane) { sm90::row_sums<D, Words<type>>(Lane{lane, &warp}, call, row, h); });
    }
  for (int h = 0; h < num_heads; ++h)
    for (int i = num_tokens; i < padded; ++i) EXPECT(std::isinf(lse2[h * padded + i]), "row %d past T", i);
  const Tiles& rows = plan.dq;
  std::vector<uint16_t> dq(q.size(), nan);
  using QueryGrad = sm90::QueryGrad<Multiprocessor::Thread, D, type>;
  launch<QueryGrad>(sm90::QueryGradParams<TensorMap>{map(q, num_heads, 64), map(dout, num_heads, 64), map(dq, num_heads, 64),
                                                     map(k, num_kv_heads, 64), map(v, num_kv_heads, 64), rows.lists(),
                                                     span.data(), rows.min_end.data(), rows.max_end.data(), lse2.data(),
                                                     delta.data(), sizes, num_items, scale, scale * kLog2e},
                    sm90::QueryGradMemory<D>::kBytes, num_blocks, seed + 7);
  near("dq", widened(type, dq), x.dq, tolerance(type));

  const Tiles& keys = plan.dkv;
  const Items& items = plan.items;
  const auto key_grad = [&]<bool kAddQueryGrad>(std::bool_constant<kAddQueryGrad>) {
    std::vector<uint16_t> dk(k.size(), nan), dv(v.size(), nan);
    std::vector<float> partial_dk(items.num_slots * num_kv_heads * 128 * D, NAN), partial_dv(partial_dk.size(), NAN);
    std::vector<float> dq_sums(kAddQueryGrad ? num_heads * padded * D : 0, 0);
    using KeyGrad = sm90::KeyGrad<Multiprocessor::Thread, D, type, kAddQueryGrad>;
    launch<KeyGrad>(
        sm90::KeyGradParams<TensorMap>{
            map(q, num_heads, 64), map(dout, num_heads, 64), map(k, num_kv_heads, 64), map(v, num_kv_heads, 64),
            map(dk, num_kv_heads, 64), map(dv, num_kv_heads, 64),
            {items.items.data(), keys.max_end.data(), keys.min_end.data()}, span.data(), items.half_min_end.data(),
            items.half_max_end.data(), lse2.data(), delta.data(), partial_dk.data(), partial_dv.data(), dq_sums.data(), sizes,
            scale, scale * kLog2e},
        sm90::KeyGradMemory<D, kAddQueryGrad>::kBytes, items.count() * num_kv_heads, seed + 13);
    for (const auto& [tile, slot, count] : items.parted)
      EXPECT(std::isnan(widen(type, dk[tile * 128 * num_kv_heads * D])), "a parted tile is written whole");
    call.partial_dk = partial_dk.data(), call.partial_dv = partial_dv.data(), call.dk = dk.data(), call.dv = dv.data();
    call.parted = items.parted.empty() ? nullptr : items.parted.front().data();
    for (int part = 0; part < static_cast<int>(items.parted.size()); ++part)
      for (int head = 0; head < num_kv_heads; ++head)
        for (int thread = 0; thread < sm90::kElementThreads; ++thread) sm90::part_sums<D, Words<type>>(call, part, head, thread);
    near("dk", widened(type, dk), x.dk, tolerance(type));
    near("dv", widened(type, dv), x.dv, tolerance(type));
    if (!kAddQueryGrad) return;
    std::fill(dq.begin(), dq.end(), nan);
    call.dq_sums = dq_sums.data(), call.dq = dq.data();
    for (int head = 0; head < num_heads; ++head)
      for (int block = 0; block < (num_tokens + 63) / 64 * (D / 64); ++block)
        for (int thread = 0; thread < sm90::kWarpgroup; ++thread) sm90::query_grad<D, Words<type>>(call, block, head, thread);
    near("dq by sums", widened(type, dq), x.dq, tolerance(type));
  };
  key_grad(std::false_type{});
  key_grad(std::true_type{});
}

template <int D, Half type>
void check(const Forest& forest, int num_heads, int num_kv_heads, int longest, unsigned seed) {
  check<D, type>(forest, num_heads, num_kv_heads, Plan(forest, longest), seed % 2 == 0, seed);
}

void check_schedule(const Forest& forest, int num_programs, int longest) {
  const int num_heads = 3, num_tokens = static_cast<int>(forest.size());
  std::set<std::tuple<int, int, int>> wanted;  // head, query tile, key tile: whatever holds a visible pair
  const Tiles tiles(forest, 128, 128);
  for (int h = 0; h < num_heads; ++h)
    for (int r = 0; r * 128 < num_tokens; ++r)
      for (int n = 0; n * 128 < num_tokens; ++n)
        if (Tiles::meet(forest, r * 128, 128, n * 128, 128) != Tile::kSkip) wanted.emplace(h, r, n);
  std::set<std::tuple<int, int, int>> seen;
  const int num_items = static_cast<int>(tiles.order.size()) * num_heads;
  for (int program = 0; program < num_programs; ++program)
    for (int round = 0; round < sm90::num_rounds(num_items, program, num_programs); ++round) {
      const auto work = sm90::QueryWork::of(tiles.lists(), sm90::item_of(round, program, num_programs), num_heads);
      bool full_came = false;
      for (int turn = 0; turn < work.num_tiles; ++turn) {
        const int n = tiles.indices[work.entry(turn)];
        const int rows = std::min(128, num_tokens - work.tile * 128);
        const bool is_full = Tiles::meet(forest, work.tile * 128, rows, n * 128, 128) == Tile::kFull;
        EXPECT(is_full || !full_came, "a partial tile behind a full one");
        full_came |= is_full;
        EXPECT(seen.emplace(work.head, work.tile, n).second, "query tile %d meets key tile %d twice", work.tile, n);
      }
    }
  EXPECT(seen == wanted, "%zu tiles of %zu", seen.size(), wanted.size());

  const Tiles keys(forest, 64, 128);
  const Items items(forest, keys, longest);
  std::set<std::pair<int, int>> taken;  // query tile, key tile
  for (int item = 0; item < items.count(); ++item) {
    const auto work = sm90::KeyWork::of<64, 128>({items.items.data(), keys.max_end.data(), keys.min_end.data()}, item, num_tokens);
    const auto take = [&](int r, bool may_be_full) {
      EXPECT(taken.emplace(r, work.tile).second, "key tile %d meets query tile %d twice", work.tile, r);
      const Tile seen = Tiles::meet(forest, r * 64, 64, work.tile * 128, 128);
      EXPECT(!may_be_full || seen == Tile::kFull, "a tile without mask that needs one");
    };
    for (int turn = 0; turn < work.num_full(); ++turn) take(work.full(turn), true);
    for (int turn = 0; turn < work.num_partial(); ++turn) take(work.partial(turn), false);
  }
  for (int r = 0; r * 64 < num_tokens; ++r)
    for (int n = 0; n * 128 < num_tokens; ++n)
      if (Tiles::meet(forest, r * 64, 64, n * 128, 128) != Tile::kSkip) EXPECT(taken.count({r, n}), "a tile is left out");

  // what a consumer decides for its 64 rows
  for (int r = 0; r * 64 + 64 <= num_tokens; ++r)
    for (int n = 0; n < static_cast<int>(tiles.max_end.size()); ++n) {
      const Tile found = sm90::classify(r * 64, 64, n * 128, 128, tiles.min_end[n], tiles.max_end[n]);
      const Tile seen = Tiles::meet(forest, r * 64, 64, n * 128, 128);
      EXPECT(found == seen, "rows of tile %d, keys of tile %d: %d, not %d", r, n, static_cast<int>(found), static_cast<int>(seen));
    }
}

Forest chain(int num_tokens) { return random_forest(num_tokens, 0, 0); }

// A trunk and leaves of equal length that branch off at its end.
Forest star(int trunk, int leaf, int num_leaves) {
  Forest forest;
  for (int t = 0; t < trunk + leaf * num_leaves; ++t) {
    const bool first = t >= trunk && (t - trunk) % leaf == 0;
    forest.parent.push_back(first ? trunk - 1 : t - 1);
    forest.position.push_back(forest.parent[t] < 0 ? 0 : forest.position[forest.parent[t]] + 1);
    forest.subtree_end.push_back(t < trunk ? trunk + leaf * num_leaves : trunk + ((t - trunk) / leaf + 1) * leaf);
  }
  return forest;
}

// Numbers in text: Hq, Hkv, D, 1 for bfloat16, 1 for sinks; then arrays, each its length first: subtree_end, and the tensors of
// treegrpo_kernels.hopper_cuda.tile_tensors in their order.
void check_file(const char* path) {
  std::ifstream file(path);
  int num_heads, num_kv_heads, head_dim, is_bfloat16, has_sinks;
  EXPECT(file >> num_heads >> num_kv_heads >> head_dim >> is_bfloat16 >> has_sinks, "no problem in %s", path);
  const auto next = [&] {
    size_t size = 0;
    EXPECT(file >> size, "%s ends too early", path);
    std::vector<int32_t> values(size);
    for (int32_t& x : values) EXPECT(file >> x, "%s ends too early", path);
    return values;
  };
  Forest forest;
  forest.subtree_end = next();
  std::vector<int32_t> above;  // whose subtrees are open
  for (int32_t t = 0; t < static_cast<int32_t>(forest.subtree_end.size()); ++t) {
    while (!above.empty() && forest.subtree_end[above.back()] <= t) above.pop_back();
    forest.parent.push_back(above.empty() ? -1 : above.back());
    forest.position.push_back(static_cast<int32_t>(above.size()));
    above.push_back(t);
  }
  Plan plan;
  for (Tiles* tiles : {&plan.fwd, &plan.dq}) {
    tiles->offsets = next(), tiles->indices = next(), tiles->full = next(), tiles->order = next();
    tiles->min_end = next(), tiles->max_end = next();
    if (tiles == &plan.fwd) plan.span = next();
  }
  // dK/dV and dQ share one list of the backward's key tiles: of 128 keys, and of their halves
  std::swap(plan.dq.min_end, plan.dkv.min_end), std::swap(plan.dq.max_end, plan.dkv.max_end);
  plan.items.half_min_end = next(), plan.items.half_max_end = next();
  plan.dq.min_end = plan.items.half_min_end, plan.dq.max_end = plan.items.half_max_end;
  plan.items.items = next();
  const std::vector<int32_t> parted = next();
  for (size_t i = 0; i < parted.size(); i += 3) {
    plan.items.parted.push_back({parted[i], parted[i + 1], parted[i + 2]});
    plan.items.num_slots += parted[i + 2];
  }
  EXPECT(plan.span == next(), "two spans");
  const auto run = [&](auto check) { check(forest, num_heads, num_kv_heads, plan, has_sinks != 0, 1u); };
  using Check = void (*)(const Forest&, int, int, const Plan&, bool, unsigned);
  if (head_dim == 64) run(is_bfloat16 ? Check(check<64, Half::kBFloat16>) : Check(check<64, Half::kFloat16>));
  else run(is_bfloat16 ? Check(check<128, Half::kBFloat16>) : Check(check<128, Half::kFloat16>));
  std::printf("sm90: kernels agree with the definition on %zu tokens\n", static_cast<size_t>(forest.size()));
}

int main(int argc, char** argv) {
  if (argc > 1) {
    for (int i = 1; i < argc; ++i) check_file(argv[i]);
    return 0;
  }
  check_descriptors();
  for (unsigned seed = 0; seed < 12; ++seed)
    for (double branch : {0.0, 0.01, 0.1, 0.5})
      check_schedule(random_forest(100 + 97 * seed, seed, branch), 1 + seed % 7, 1 + seed % 5);
  // branches that start at every residue of the tiles
  for (int trunk = 1; trunk < 140; trunk += 1) check_schedule(star(trunk, 70, 4), 5, 3);

  constexpr Half kBFloat16 = Half::kBFloat16, kFloat16 = Half::kFloat16;
  check<128, kFloat16>(chain(300), 2, 1, 100, 1);
  check<64, kFloat16>(chain(129), 2, 2, 100, 2);
  check<128, kFloat16>(star(100, 61, 4), 4, 2, 2, 3);
  check<64, kFloat16>(star(5, 90, 5), 2, 1, 3, 4);
  // a consumer skips three key tiles in a row while a product waits
  check<128, kFloat16>(star(100, 476, 2), 1, 1, 5, 8);
  check<128, kBFloat16>(star(190, 130, 2), 2, 1, 100, 5);
  check<64, kBFloat16>(random_forest(333, 3, 0.05), 3, 3, 2, 6);
  for (unsigned seed = 0; seed < 6; ++seed) {
    check<128, kFloat16>(random_forest(260 + 51 * seed, seed, 0.03), 2, 1, 2, 30 + seed);
    check<64, kFloat16>(random_forest(1 + 65 * seed, seed + 9, 0.2), 2, 1, 100, 60 + seed);
  }
  std::printf("sm90: schedule and kernels agree with the definition\n");
}
