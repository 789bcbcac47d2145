// Tiles, scratch memory, packed operands and the mask of one register tile.
// Included once per instruction set, inside that set's namespace.

constexpr double kLog2e = 1.4426950408889634074;
constexpr int64_t kTile = 96;          // query rows of a task and keys of a backward tile; whole register tiles both ways
constexpr int64_t kStep = 4 * kTile;   // keys between two updates of the running maximum in the forward
constexpr int64_t kCacheLine = 64;

static_assert(kTile % kMicroRows == 0);

// keys of a register tile
template <typename S>
constexpr int64_t kPanel = 2 * Simd<S>::kWidth;

// Row stride of scratch rows: known to the compiler, and an odd number of cache lines, so that rows do not share cache sets.
template <typename S>
constexpr int64_t kStride = 256 + kCacheLine / sizeof(S);

template <typename S>
constexpr int64_t padded(int64_t dim) {
  return (dim + Simd<S>::kWidth - 1) / Simd<S>::kWidth * Simd<S>::kWidth;
}

inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, uint16_t* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // round to nearest even; a NaN keeps a set mantissa bit
  *to = static_cast<uint16_t>(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Uninitialised memory on cache lines.
template <typename S>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<S*>(take_memory(std::max<int64_t>(size, 1) * static_cast<int64_t>(sizeof(S))))) {}
  S* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(S* p) const { give_memory(p); }
  };
  std::unique_ptr<S, Free> data_;
};

// `rows` rows of one head, `stride` apart -> to [rows][ld], times `factor`; columns up to `wide` and rows up to `all`
// become zero.
template <typename S, typename In>
inline void load_rows(const In* x, int64_t stride, int64_t rows, int64_t dim, S factor, S* to, int64_t ld, int64_t wide,
                      int64_t all) {
  for (int64_t t = 0; t < rows; ++t, to += ld, x += stride) {
    for (int64_t d = 0; d < dim; ++d) to[d] = widen(x[d]) * factor;
    for (int64_t d = dim; d < wide; ++d) to[d] = S(0);
  }
  for (int64_t t = std::max<int64_t>(rows, 0); t < all; ++t, to += ld) std::fill(to, to + wide, S(0));
}

// Asks for `rows` rows of `bytes` bytes, `stride` bytes apart, before they are needed.
inline void fetch_rows(const void* x, int64_t stride, int64_t rows, int64_t bytes) {
  // without this, GCC takes a function that only prefetches for one without effect and drops its calls
  asm volatile("");
  const char* row = static_cast<const char*>(x);
  for (int64_t t = 0; t < rows; ++t, row += stride)
    for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(row + at, 0, 3);
}

template <typename S, typename In>
inline void store_row(const S* x, int64_t dim, S factor, In* to) {
  for (int64_t d = 0; d < dim; ++d) narrow(x[d] * factor, to + d);
}

// kPanel rows [.][ld] -> to [dim][kPanel]
template <typename S>
inline void transpose_panel(const S* x, int64_t ld, int64_t dim, S* to) {
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t n = 0; n < kPanel<S>; ++n) to[d * kPanel<S> + n] = x[n * ld + d];
}

// Hands out task numbers in order until they are used up; which worker runs which task changes no result.
template <typename Work>
inline void run_tasks(const Parallel& parallel, int64_t num_workers, int64_t num_tasks, const Work& work) {
  std::atomic<int64_t> next{0};
  parallel(std::max<int64_t>(1, std::min(num_workers, num_tasks)), [&](int64_t worker) {
    for (int64_t task = next++; task < num_tasks; task = next++) work(task, worker);
  });
}

// The mask of the whole row, padded to whole tiles, with its summaries at the sizes the kernels walk in.
template <typename S>
struct MaskArrays {
  using Int = typename Simd<S>::Int;
  int64_t num_padded, window;
  std::vector<Int> subtree_end;  // [num_padded], 0 past the end: such a key is visible to no row
  std::vector<Int> position;     // [num_padded]
  Blocks groups;                 // of kMicroRows tokens
  Blocks panels;                 // of kPanel tokens
  Blocks tiles;                  // of kTile tokens

  MaskArrays(const Mask& mask, int64_t num_tokens)
      : num_padded(round_up(num_tokens, kStep)),
        window(mask.window),
        subtree_end(mask.subtree_end, mask.subtree_end + num_tokens),
        position(mask.position, mask.position + num_tokens) {
    subtree_end.resize(num_padded, 0);
    position.resize(num_padded, 0);
    groups = blocks(mask, num_tokens, kMicroRows);
    panels = blocks(mask, num_tokens, kPanel<S>);
    tiles = blocks(mask, num_tokens, kTile);
  }

  Blocks blocks(const Mask& mask, int64_t num_tokens, int64_t size) const {
    return summarise(mask.subtree_end, mask.position, num_tokens, round_up(num_padded, size), size);
  }

  // Lanes of the keys j .. j + width - 1 that query i sees.
  typename Simd<S>::IntVec visible(int64_t i, int64_t j) const {
    using V = Simd<S>;
    const Int row = static_cast<Int>(i);
    typename V::IntVec seen = (V::iota() + static_cast<Int>(j) <= row) & (V::load_int(&subtree_end[j]) > row);
    if (window) seen &= position[i] - V::load_int(&position[j]) < static_cast<Int>(window);
    return seen;
  }
};

// What is multiplied into q while packing: with a softcap the argument of tanh, else the score in base 2.
inline double query_factor(const Score& score) {
  return score.softcap > 0 ? score.scale / score.softcap : score.scale * kLog2e;
}
