// Vectors of TREEGRPO_VECTOR_BYTES and what attention needs of them: the register-blocked product, exp2 and tanh.
// Included once per instruction set, inside that set's namespace; GCC vector extensions, no intrinsics.

template <typename S>
struct Simd {
  static constexpr int kWidth = TREEGRPO_VECTOR_BYTES / sizeof(S);
  using Int = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;
  using Unsigned = std::make_unsigned_t<Int>;
  typedef S Vec __attribute__((vector_size(TREEGRPO_VECTOR_BYTES)));
  typedef S Loose __attribute__((vector_size(TREEGRPO_VECTOR_BYTES), aligned(alignof(S)), may_alias));
  typedef Int IntVec __attribute__((vector_size(TREEGRPO_VECTOR_BYTES)));
  typedef Int LooseInt __attribute__((vector_size(TREEGRPO_VECTOR_BYTES), aligned(alignof(S)), may_alias));
  typedef Unsigned BitVec __attribute__((vector_size(TREEGRPO_VECTOR_BYTES)));

  static Vec load(const S* p) { return *reinterpret_cast<const Loose*>(p); }
  static void store(S* p, Vec x) { *reinterpret_cast<Loose*>(p) = x; }
  static Vec all(S x) { return x - Vec{}; }
  static Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static IntVec load_int(const Int* p) { return *reinterpret_cast<const LooseInt*>(p); }
  static IntVec iota() {
    IntVec x;
    for (int i = 0; i < kWidth; ++i) x[i] = i;
    return x;
  }
};

// Largest of BYTES / sizeof(S) neighbours, by halves.
template <typename S, int BYTES>
inline S max_of(const S* p) {
  constexpr int kCount = BYTES / sizeof(S);
  if constexpr (BYTES <= 16) {
    S high = p[0];
    for (int i = 1; i < kCount; ++i) high = high > p[i] ? high : p[i];
    return high;
  } else {
    typedef S Half __attribute__((vector_size(BYTES / 2)));
    typedef S LooseHalf __attribute__((vector_size(BYTES / 2), aligned(alignof(S)), may_alias));
    const Half a = *reinterpret_cast<const LooseHalf*>(p), b = *reinterpret_cast<const LooseHalf*>(p + kCount / 2);
    S half[kCount / 2];
    *reinterpret_cast<LooseHalf*>(half) = a > b ? a : b;
    return max_of<S, BYTES / 2>(half);
  }
}

template <typename S>
inline S sum_of(typename Simd<S>::Vec x) {
  S sum = x[0];
  for (int i = 1; i < Simd<S>::kWidth; ++i) sum += x[i];
  return sum;
}

// 2^x: x = n + f with |f| <= 1/2, 2^f by a minimax polynomial (relative error 8e-8 for float, 3e-18 for double), 2^n
// through the exponent bits. Exactly 0 below the normal range, -inf included; NaN stays NaN. Not for x above the range.
template <typename S>
inline typename Simd<S>::Vec exp2(typename Simd<S>::Vec x) {
  using Vec = typename Simd<S>::Vec;
  using Bits = typename Simd<S>::BitVec;
  constexpr bool kSingle = sizeof(S) == 4;
  constexpr S kLowest = kSingle ? S(-125) : S(-1021);
  // adding 1.5 * 2^(mantissa bits) rounds to an integer and leaves that integer in the low bits; the shift drops the rest
  constexpr S kMagic = kSingle ? S(12582912.0) : S(6755399441055744.0);
  constexpr int kMantissa = kSingle ? 23 : 52;
  const Vec shifted = x + kMagic;
  const Vec f = x - (shifted - kMagic);
  Vec y;
  if constexpr (kSingle) {
    y = 1.3390863664e-3f * f + 9.6760319183e-3f;
    y = y * f + 5.5503571142e-2f;
    y = y * f + 2.4022107485e-1f;
    y = y * f + 6.9314718803e-1f;
    y = y * f + 1.0000000755f;
  } else {
    y = 4.455817908336064493e-10 * f + 7.0741942972885210056e-9;
    y = y * f + 1.0178057087733941105e-7;
    y = y * f + 1.3215432535912376166e-6;
    y = y * f + 1.5252733841556773487e-5;
    y = y * f + 1.5403530463724354e-4;
    y = y * f + 1.3333558146406470697e-3;
    y = y * f + 9.6181291075872566681e-3;
    y = y * f + 5.5504108664821627039e-2;
    y = y * f + 2.4022650695910159567e-1;
    y = y * f + 6.9314718055994530925e-1;
    y = y * f + 1.0;
  }
  y = (Vec)((Bits)y + ((Bits)shifted << kMantissa));
  // the exponent's addition may carry a NaN's low bits into a number
  return x < kLowest ? Vec{} : (x == x ? y : x);
}

// tanh(x) = 1 - 2 / (e^2|x| + 1) with the sign of x; near 0, where that cancels, x times a polynomial in x^2.
template <typename S>
inline typename Simd<S>::Vec tanh(typename Simd<S>::Vec x) {
  using Vec = typename Simd<S>::Vec;
  constexpr S kTwoLog2e = S(2.885390081777926815), kFlat = sizeof(S) == 4 ? S(10) : S(20);
  Vec size = x < 0 ? -x : x;
  size = size > kFlat ? Simd<S>::all(kFlat) : size;
  const Vec big = S(1) - S(2) / (exp2<S>(size * kTwoLog2e) + S(1));
  Vec y = x < 0 ? -big : big;
  if constexpr (sizeof(S) == 4) {
    const Vec z = x * x;
    Vec small = -5.59978503728e-3f * z + 2.05369719979e-2f;
    small = small * z + -5.37042774388e-2f;
    small = small * z + 1.33309171694e-1f;
    small = small * z + -3.33332514473e-1f;
    small = small * z + 1.0f;
    y = z < 0.4f ? small * x : y;
  }
  return y;
}

// The register tile: kMicroRows x (1 or 2 vectors). Its accumulators, a row of B and one broadcast fit the registers: 32
// of them from AVX-512 on, 16 before.
constexpr int kMicroRows = TREEGRPO_VECTOR_BYTES == 64 ? 12 : 6;

template <typename S, int VECS>
using Micro = typename Simd<S>::Vec[kMicroRows][VECS];

// acc += A B: A[m, k] = a[m * ROW_A + k * COL_A], rows of B `ldb` apart.
template <typename S, int VECS, int ROW_A, int COL_A>
inline __attribute__((always_inline)) void multiply(Micro<S, VECS>& acc, const S* a, const S* b, int64_t ldb,
                                                    int64_t depth) {
  using V = Simd<S>;
  for (int64_t k = 0; k < depth; ++k, a += COL_A, b += ldb) {
    typename V::Vec row[VECS];
#pragma GCC unroll 2
    for (int n = 0; n < VECS; ++n) row[n] = V::load(b + n * V::kWidth);
#pragma GCC unroll 12
    for (int m = 0; m < kMicroRows; ++m) {
      const S x = a[m * ROW_A];
#pragma GCC unroll 2
      for (int n = 0; n < VECS; ++n) acc[m][n] += x * row[n];
    }
  }
}

// C [kMicroRows x VECS * width] = C * diag(keep) + A B; without `keep`, C + A B.
template <typename S, int VECS, int ROW_A, int COL_A>
inline void accumulate_block(const S* a, const S* b, int64_t ldb, int64_t depth, S* c, int64_t ldc, const S* keep) {
  using V = Simd<S>;
  Micro<S, VECS> acc;
#pragma GCC unroll 12
  for (int m = 0; m < kMicroRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < VECS; ++n) acc[m][n] = V::load(c + m * ldc + n * V::kWidth);
  if (keep != nullptr) {
#pragma GCC unroll 12
    for (int m = 0; m < kMicroRows; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < VECS; ++n) acc[m][n] *= keep[m];
  }
  multiply<S, VECS, ROW_A, COL_A>(acc, a, b, ldb, depth);
#pragma GCC unroll 12
  for (int m = 0; m < kMicroRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < VECS; ++n) V::store(c + m * ldc + n * V::kWidth, acc[m][n]);
}

// The same for `cols` columns, a multiple of the vector width.
template <typename S, int ROW_A, int COL_A>
inline void accumulate(const S* a, const S* b, int64_t ldb, int64_t depth, S* c, int64_t ldc, int64_t cols,
                       const S* keep) {
  constexpr int kWidth = Simd<S>::kWidth;
  int64_t n = 0;
  for (; n + 2 * kWidth <= cols; n += 2 * kWidth)
    accumulate_block<S, 2, ROW_A, COL_A>(a, b + n, ldb, depth, c + n, ldc, keep);
  if (n < cols) accumulate_block<S, 1, ROW_A, COL_A>(a, b + n, ldb, depth, c + n, ldc, keep);
}
