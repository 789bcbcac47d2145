// Packed copies of the operands in the computing type, laid out for product(): padded rows, and transposed key tiles.
// Included once per instruction set, inside that set's namespace.

constexpr int64_t kBlockM = 96;  // query rows of a tile: a multiple of kBlockRows
constexpr int64_t kBlockN = 64;  // keys of a tile: a multiple of every vector width

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
  if (x != x) {
    *to = 0x7fc0;
    return;
  }
  *to = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // round to nearest even
}

template <typename S>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<S*>(std::aligned_alloc(64, bytes(size)))) {
    if (!data_) throw std::bad_alloc();
  }
  S* get() const { return data_.get(); }

 private:
  static size_t bytes(int64_t size) { return (std::max<int64_t>(size, 1) * sizeof(S) + 63) / 64 * 64; }
  struct Free {
    void operator()(S* p) const { std::free(p); }
  };
  std::unique_ptr<S, Free> data_;
};

template <typename S>
constexpr int64_t padded(int64_t dim) {
  return (dim + Simd<S>::kWidth - 1) / Simd<S>::kWidth * Simd<S>::kWidth;
}

// Rows [t0, t1) of head `h` of x [T, heads, dim] -> to [t1 - t0][padded dim], times `factor`, zero-filled.
template <typename S, typename In>
inline void pack_rows(const In* x, int64_t heads, int64_t dim, int64_t h, int64_t t0, int64_t t1, S factor, S* to) {
  const int64_t wide = padded<S>(dim);
  for (int64_t t = t0; t < t1; ++t, to += wide) {
    const In* from = x + (t * heads + h) * dim;
    for (int64_t d = 0; d < dim; ++d) to[d] = widen(from[d]) * factor;
    for (int64_t d = dim; d < wide; ++d) to[d] = S(0);
  }
}

// One key tile transposed: rows [n0, n1) of head `h` -> to [dim][kBlockN], zero-filled.
template <typename S, typename In>
inline void pack_transposed(const In* x, int64_t heads, int64_t dim, int64_t h, int64_t n0, int64_t n1, S* to) {
  for (int64_t n = n0; n < n1; ++n) {
    const In* from = x + (n * heads + h) * dim;
    for (int64_t d = 0; d < dim; ++d) to[d * kBlockN + (n - n0)] = widen(from[d]);
  }
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t n = n1 - n0; n < kBlockN; ++n) to[d * kBlockN + n] = S(0);
}

// Keys or values of every head, packed once per call by all workers.
template <typename S>
struct Packed {
  int64_t num_tokens, dim, wide, num_tiles;
  Buffer<S> rows;        // [heads][T][padded dim]
  Buffer<S> transposed;  // [heads][NK][dim][kBlockN]

  Packed(int64_t heads, int64_t tokens, int64_t dim_, bool with_rows, bool with_transposed)
      : num_tokens(tokens),
        dim(dim_),
        wide(padded<S>(dim_)),
        num_tiles((tokens + kBlockN - 1) / kBlockN),
        rows(with_rows ? heads * tokens * wide : 0),
        transposed(with_transposed ? heads * num_tiles * dim * kBlockN : 0) {}

  S* row(int64_t head, int64_t token) const { return rows.get() + (head * num_tokens + token) * wide; }
  S* tile(int64_t head, int64_t n) const { return transposed.get() + (head * num_tiles + n) * dim * kBlockN; }
};

// Hands out task numbers until they are used up; which worker runs which task changes no result.
inline void run_tasks(const Parallel& parallel, int64_t num_workers, int64_t num_tasks,
                      const std::function<std::function<void(int64_t)>()>& make_worker) {
  std::atomic<int64_t> next{0};
  parallel(std::max<int64_t>(1, std::min(num_workers, num_tasks)), [&](int64_t) {
    const std::function<void(int64_t)> work = make_worker();
    for (int64_t task = next++; task < num_tasks; task = next++) work(task);
  });
}

// Extremes of position over the query tiles, for windows; the mask's arrays padded so that whole vectors can be loaded.
struct MaskArrays {
  std::vector<int32_t> subtree_end;  // [T + kBlockN], 0 past the end: such a key is visible to no row
  std::vector<int32_t> position;     // [T + kBlockN]
  std::vector<int32_t> row_pos_min, row_pos_max;
  KeyTiles tiles;

  MaskArrays(const Mask& mask, int64_t num_tokens)
      : subtree_end(mask.subtree_end, mask.subtree_end + num_tokens),
        position(mask.position, mask.position + num_tokens),
        tiles(key_tiles(mask.subtree_end, mask.position, num_tokens, kBlockN)) {
    for (int64_t m0 = 0; m0 < num_tokens; m0 += kBlockM) {
      const auto [low, high] =
          std::minmax_element(mask.position + m0, mask.position + std::min(num_tokens, m0 + kBlockM));
      row_pos_min.push_back(*low);
      row_pos_max.push_back(*high);
    }
    subtree_end.resize(num_tokens + kBlockN, 0);
    position.resize(num_tokens + kBlockN, 0);
  }
};

// Lanes of the keys j .. j + width - 1 that query i sees.
template <typename S>
inline typename Simd<S>::IntVec visible(const MaskArrays& mask, int64_t window, int64_t i, int64_t j) {
  using V = Simd<S>;
  using Int = typename V::Int;
  const typename V::IntVec key = V::iota() + static_cast<Int>(j);
  const typename V::IntVec end = V::load_int(mask.subtree_end.data() + j);
  typename V::IntVec seen = (key <= static_cast<Int>(i)) & (end > static_cast<Int>(i));
  if (window) {
    const typename V::IntVec position = V::load_int(mask.position.data() + j);
    seen &= static_cast<Int>(mask.position[i]) - position < static_cast<Int>(window);
  }
  return seen;
}
