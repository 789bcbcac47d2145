// Vectors of TREEGRPO_VECTOR_BYTES and the two things attention needs of them: a register-blocked matrix product and exp2.
// Included once per instruction set, inside that set's namespace; GCC vector extensions, no intrinsics.

template <typename S>
struct Simd {
  static constexpr int kWidth = TREEGRPO_VECTOR_BYTES / sizeof(S);
  using Int = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;
  typedef S Vec __attribute__((vector_size(TREEGRPO_VECTOR_BYTES)));
  typedef S Loose __attribute__((vector_size(TREEGRPO_VECTOR_BYTES), aligned(alignof(S)), may_alias));
  typedef Int IntVec __attribute__((vector_size(TREEGRPO_VECTOR_BYTES)));

  static Vec load(const S* p) { return *reinterpret_cast<const Loose*>(p); }
  static void store(S* p, Vec x) { *reinterpret_cast<Loose*>(p) = x; }
  static Vec all(S x) { return x - Vec{}; }
  static Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static S max_of(Vec x) {
    S m = x[0];
    for (int i = 1; i < kWidth; ++i) m = m > x[i] ? m : x[i];
    return m;
  }
  static S sum_of(Vec x) {
    S s = x[0];
    for (int i = 1; i < kWidth; ++i) s += x[i];
    return s;
  }
  // subtree_end or position of kWidth neighbours, widened to the lanes of Vec
  static IntVec load_int(const int32_t* p) {
    IntVec x;
    for (int i = 0; i < kWidth; ++i) x[i] = p[i];
    return x;
  }
  static IntVec iota() {
    IntVec x;
    for (int i = 0; i < kWidth; ++i) x[i] = i;
    return x;
  }
};

// 2^x: x = n + f with |f| <= 1/2, 2^f by the polynomial that interpolates it at Chebyshev nodes (relative error 2.5e-9 for float,
// 4e-18 for double), 2^n through the exponent bits. Below the normal range the result is exactly 0.
template <typename S>
inline typename Simd<S>::Vec exp2(typename Simd<S>::Vec x) {
  using Vec = typename Simd<S>::Vec;
  using IntVec = typename Simd<S>::IntVec;
  constexpr bool kSingle = sizeof(S) == 4;
  constexpr S kLowest = kSingle ? S(-125) : S(-1021);
  constexpr S kHighest = kSingle ? S(127) : S(1023);
  // adding 1.5 * 2^(mantissa bits) rounds to an integer and leaves that integer in the low bits
  constexpr S kMagic = kSingle ? S(12582912.0) : S(6755399441055744.0);
  constexpr int kMantissa = kSingle ? 23 : 52;
  const IntVec in_range = x >= kLowest;
  x = in_range ? x : Simd<S>::all(kLowest);
  x = x <= kHighest ? x : Simd<S>::all(kHighest);
  const Vec shifted = x + kMagic;
  const Vec f = x - (shifted - kMagic);
  const IntVec n = (IntVec)shifted - (IntVec)Simd<S>::all(kMagic);
  Vec y;
  if constexpr (kSingle) {
    y = 1.5461444698569129e-4f * f + 1.3400428177615838e-3f;
    y = y * f + 9.618056678524638e-3f;
    y = y * f + 5.5503272266703021e-2f;
    y = y * f + 2.4022650922288759e-1f;
    y = y * f + 6.931472067028326e-1f;
  } else {
    y = 4.455817908336064e-10 * f + 7.074194297288521e-9;
    y = y * f + 1.0178057087733941e-7;
    y = y * f + 1.3215432535912376e-6;
    y = y * f + 1.5252733841556773e-5;
    y = y * f + 1.5403530463724354e-4;
    y = y * f + 1.333355814640647e-3;
    y = y * f + 9.618129107587257e-3;
    y = y * f + 5.550410866482163e-2;
    y = y * f + 2.402265069591016e-1;
    y = y * f + 6.931471805599453e-1;
  }
  y = y * f + S(1);
  y = (Vec)((IntVec)y + (n << kMantissa));
  return in_range ? y : Vec{};
}

// tanh(x) = 1 - 2 / (e^2x + 1)
template <typename S>
inline typename Simd<S>::Vec tanh(typename Simd<S>::Vec x) {
  constexpr S kTwoLog2e = S(2.885390081777926815);
  return S(1) - S(2) / (exp2<S>(x * kTwoLog2e) + S(1));
}

// C [ROWS x VECS * width] = A B, or += when ADD. A[m, k] = a[m * row_a + k * col_a]; B rows are `ldb` apart, contiguous inside.
template <typename S, int ROWS, int VECS, bool ADD>
inline void product_block(const S* a, int64_t row_a, int64_t col_a, const S* b, int64_t ldb, S* c, int64_t ldc,
                          int64_t depth) {
  using V = Simd<S>;
  typename V::Vec acc[ROWS][VECS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < VECS; ++n) acc[m][n] = ADD ? V::load(c + m * ldc + n * V::kWidth) : typename V::Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    typename V::Vec row[VECS];
#pragma GCC unroll 4
    for (int n = 0; n < VECS; ++n) row[n] = V::load(b + k * ldb + n * V::kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const S x = a[m * row_a + k * col_a];
#pragma GCC unroll 4
      for (int n = 0; n < VECS; ++n) acc[m][n] += x * row[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < VECS; ++n) V::store(c + m * ldc + n * V::kWidth, acc[m][n]);
}

// accumulators plus one row of B must fit the registers: 32 of them from AVX-512 on, 16 before
constexpr int kBlockRows = 6;
constexpr int kBlockVecs = TREEGRPO_VECTOR_BYTES == 64 ? 4 : 2;

template <typename S, int VECS, bool ADD>
inline void product_rows(int64_t rows, const S* a, int64_t row_a, int64_t col_a, const S* b, int64_t ldb, S* c,
                         int64_t ldc, int64_t depth) {
  for (; rows >= kBlockRows; rows -= kBlockRows, a += kBlockRows * row_a, c += kBlockRows * ldc)
    product_block<S, kBlockRows, VECS, ADD>(a, row_a, col_a, b, ldb, c, ldc, depth);
  switch (rows) {
    case 5: return product_block<S, 5, VECS, ADD>(a, row_a, col_a, b, ldb, c, ldc, depth);
    case 4: return product_block<S, 4, VECS, ADD>(a, row_a, col_a, b, ldb, c, ldc, depth);
    case 3: return product_block<S, 3, VECS, ADD>(a, row_a, col_a, b, ldb, c, ldc, depth);
    case 2: return product_block<S, 2, VECS, ADD>(a, row_a, col_a, b, ldb, c, ldc, depth);
    case 1: return product_block<S, 1, VECS, ADD>(a, row_a, col_a, b, ldb, c, ldc, depth);
    default: return;
  }
}

// C [rows x cols] (+)= A B; cols is rounded up to whole vectors, which B and C must have room for.
template <typename S, bool ADD>
inline void product(int64_t rows, int64_t cols, int64_t depth, const S* a, int64_t row_a, int64_t col_a, const S* b,
                    int64_t ldb, S* c, int64_t ldc) {
  constexpr int kWidth = Simd<S>::kWidth;
  int64_t vecs = (cols + kWidth - 1) / kWidth;
  for (; vecs >= kBlockVecs; vecs -= kBlockVecs, b += kBlockVecs * kWidth, c += kBlockVecs * kWidth)
    product_rows<S, kBlockVecs, ADD>(rows, a, row_a, col_a, b, ldb, c, ldc, depth);
  if constexpr (kBlockVecs == 4) {
    if (vecs == 3) return product_rows<S, 3, ADD>(rows, a, row_a, col_a, b, ldb, c, ldc, depth);
    if (vecs == 2) return product_rows<S, 2, ADD>(rows, a, row_a, col_a, b, ldb, c, ldc, depth);
  }
  if (vecs == 1) product_rows<S, 1, ADD>(rows, a, row_a, col_a, b, ldb, c, ldc, depth);
}
