// Scalar types, address spaces and compile-time helpers of the Metal shading language.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define MSL_AI inline __attribute__((always_inline))
#define METAL_FUNC inline __attribute__((always_inline))
#define MSL_TRAP(text) __attribute__((unavailable(text)))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef __bf16 bfloat;

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define HUGE_VALF (__builtin_inff())
#define MAXFLOAT 0x1.fffffep127f
#define FLT_MAX 0x1.fffffep127f
#define FLT_MIN 0x1p-126f
#define FLT_EPSILON 0x1p-23f
#define HALF_MAX ((half)0x1.ffcp15f)
#define HALF_MIN ((half)0x1p-14f)
#define HALF_EPSILON ((half)0x1p-10f)
#define CHAR_BIT 8
#define CHAR_MAX 127
#define UCHAR_MAX 255
#define SHRT_MIN (-32768)
#define SHRT_MAX 32767
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define LONG_MAX 9223372036854775807l
#define LONG_MIN (-9223372036854775807l - 1)
#define ULONG_MAX 18446744073709551615ul
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.78539816339744830962f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_PI_F 0.63661977236758134308f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f

namespace metal {
template <class T, T v> struct integral_constant {
  static constexpr __constant T value = v;
  typedef T value_type;
  constexpr operator T() const { return v; }
};
template <bool b> using bool_constant = integral_constant<bool, b>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B>
constexpr __constant bool is_same_v = __is_same(A, B);
template <bool c, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool c, class T = void> using enable_if_t = typename enable_if<c, T>::type;
template <bool c, class A, class B> struct conditional { typedef A type; };
template <class A, class B> struct conditional<false, A, B> { typedef B type; };
template <bool c, class A, class B> using conditional_t = typename conditional<c, A, B>::type;
template <class T> struct remove_cv { typedef T type; };
template <class T> struct remove_cv<const T> { typedef T type; };
template <class T> struct remove_cv<volatile T> { typedef T type; };
template <class T> struct remove_cv<const volatile T> { typedef T type; };
template <class T> using remove_cv_t = typename remove_cv<T>::type;

template <class T> struct remove_addrspace { typedef T type; };
template <class T> struct remove_addrspace<device T> { typedef T type; };
template <class T> struct remove_addrspace<threadgroup T> { typedef T type; };
template <class T> struct remove_addrspace<thread T> { typedef T type; };
template <class T> struct remove_addrspace<__constant T> { typedef T type; };
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;

template <class T> constexpr __constant bool is_floating_point_v =
    __is_same(T, float) || __is_same(T, half) || __is_same(T, bfloat);
template <class T> constexpr __constant bool is_integral_v = __is_integral(T);
template <class T> constexpr __constant bool is_arithmetic_v =
    is_floating_point_v<T> || __is_integral(T);
template <class T> constexpr __constant bool is_signed_v =
    is_floating_point_v<T> || (__is_integral(T) && (T)-1 < (T)0);
template <class T> constexpr __constant bool is_unsigned_v = __is_integral(T) && !((T)-1 < (T)0);
template <class T> struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T> struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T> struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T> struct is_signed : bool_constant<is_signed_v<T>> {};
template <class T> struct is_unsigned : bool_constant<is_unsigned_v<T>> {};

template <class T> struct make_unsigned { typedef T type; };
template <> struct make_unsigned<char> { typedef uchar type; };
template <> struct make_unsigned<signed char> { typedef uchar type; };
template <> struct make_unsigned<short> { typedef ushort type; };
template <> struct make_unsigned<int> { typedef uint type; };
template <> struct make_unsigned<long> { typedef ulong type; };
template <class T> using make_unsigned_t = typename make_unsigned<T>::type;

// T(v), also between half and bfloat, which clang refuses to convert.
template <class T, class U> MSL_AI T msl_cast(U v) {
  if constexpr (is_floating_point_v<T> && is_floating_point_v<U>) return (T)(float)v;
  else return T(v);
}

// Reads the bytes of one type as another; both must have the same size.
template <class To, class From> MSL_AI To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the two types differ in size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T> struct numeric_limits;
#define MSL_INT_LIMITS(T, lo, hi)                                        \
  template <> struct numeric_limits<T> {                                 \
    static constexpr T min() { return (T)(lo); }                           \
    static constexpr T max() { return (T)(hi); }                           \
    static constexpr T lowest() { return (T)(lo); }                        \
    static constexpr __constant bool is_integer = true;                  \
    static constexpr __constant int digits = sizeof(T) * 8 - ((T)-1 < (T)0); \
  };
MSL_INT_LIMITS(bool, 0, 1)
MSL_INT_LIMITS(char, -128, CHAR_MAX)
MSL_INT_LIMITS(signed char, -128, CHAR_MAX)
MSL_INT_LIMITS(uchar, 0, UCHAR_MAX)
MSL_INT_LIMITS(short, SHRT_MIN, SHRT_MAX)
MSL_INT_LIMITS(ushort, 0, USHRT_MAX)
MSL_INT_LIMITS(int, INT_MIN, INT_MAX)
MSL_INT_LIMITS(uint, 0, UINT_MAX)
MSL_INT_LIMITS(long, LONG_MIN, LONG_MAX)
MSL_INT_LIMITS(ulong, 0, ULONG_MAX)
#define MSL_FLOAT_LIMITS(T, lo, hi, eps, dig)                      \
  template <> struct numeric_limits<T> {                           \
    static constexpr T min() { return (T)lo; }                     \
    static constexpr T max() { return (T)hi; }                     \
    static constexpr T lowest() { return (T) - hi; }               \
    static constexpr T epsilon() { return (T)eps; }                \
    static constexpr T infinity() { return (T)INFINITY; }          \
    static constexpr T quiet_NaN() { return (T)NAN; }              \
    static constexpr __constant bool is_integer = false;           \
    static constexpr __constant int digits = dig;                  \
  };
MSL_FLOAT_LIMITS(float, FLT_MIN, FLT_MAX, FLT_EPSILON, 24)
MSL_FLOAT_LIMITS(half, 0x1p-14f, 0x1.ffcp15f, 0x1p-10f, 11)
MSL_FLOAT_LIMITS(bfloat, 0x1p-126f, 0x1.fep127f, 0x1p-7f, 8)
} // namespace metal
