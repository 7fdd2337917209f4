// Memory and threads, as the drivers of all kernels use them. For the baseline only: never included in a level.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t rounded_up(int64_t n, int64_t unit) { return ceil_divide(n, unit) * unit; }

constexpr int64_t kPast = 1 << 21;  // results that are written past the caches: 8 MB, more than a second-level cache holds

// ``count`` values, not initialised, aligned to the longest vectors; a vector may be read or written beyond their end.
template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t count)
        : values_(static_cast<T*>(::operator new[](std::max<int64_t>(count, 1) * sizeof(T) + 64, std::align_val_t(64)))) {}
    T* get() const { return values_.get(); }
    T& operator[](int64_t i) const { return values_[i]; }

  private:
    struct Free {
        void operator()(T* x) const { ::operator delete[](x, std::align_val_t(64)); }
    };
    std::unique_ptr<T[], Free> values_;
};

inline Buffer<float> zeros(int64_t count) {
    Buffer<float> made(count);
    std::fill(made.get(), made.get() + count, 0.0f);
    return made;
}

// fn(from, to, part) over [0, count) in contiguous parts, one a thread, cut at multiples of ``unit``.
template <class Function>
void in_parts(int64_t count, int64_t threads, int64_t unit, const Function& fn) {
    const int64_t units = ceil_divide(count, unit), parts = std::min(threads, units);
    if (parts <= 1) return fn(int64_t(0), count, int64_t(0));
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part)
        fn(units * part / parts * unit, std::min(count, units * (part + 1) / parts * unit), part);
}
