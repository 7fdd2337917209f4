// Tensors that Python hands over, as attributes of an object: read by name, their shape and kind checked, and held for as
// long as what points to them. For the baseline only: never included in a level.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

using Shape = std::vector<int64_t>;

// What torch calls a type of values.
template <class T>
const char* kind_of();
template <>
inline const char* kind_of<float>() { return "torch.float32"; }
template <>
inline const char* kind_of<double>() { return "torch.float64"; }
template <>
inline const char* kind_of<uint8_t>() { return "torch.uint8"; }
template <>
inline const char* kind_of<int16_t>() { return "torch.int16"; }
template <>
inline const char* kind_of<int64_t>() { return "torch.int64"; }

inline std::string text_of(const Shape& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

inline int64_t integer(nanobind::handle owner, const char* name) { return nanobind::cast<int64_t>(owner.attr(name)); }

inline Shape sizes_of(nanobind::handle tensor) {
    Shape sizes;
    for (nanobind::handle size : tensor.attr("shape")) sizes.push_back(nanobind::cast<int64_t>(size));
    return sizes;
}

inline Shape shape_of(nanobind::handle owner, const char* name) { return sizes_of(nanobind::object(owner.attr(name))); }

class Arrays {
  public:
    // The tensor ``name`` of ``owner``, null where that is None; raises ValueError for another shape or kind than these.
    template <class T>
    T* take(nanobind::handle owner, const char* name, const Shape& shape) {
        const nanobind::object tensor = owner.attr(name);
        if (tensor.is_none()) return nullptr;
        const nanobind::object kind = tensor.attr("dtype");
        const nanobind::str found(kind);
        const bool plain = nanobind::cast<bool>(tensor.attr("is_cpu")) && nanobind::cast<bool>(tensor.attr("is_contiguous")());
        if (!plain || std::strcmp(found.c_str(), kind_of<T>()) != 0 || sizes_of(tensor) != shape)
            throw nanobind::value_error((std::string(name) + " is " + found.c_str() + " " + text_of(sizes_of(tensor)) + "; needed is " + kind_of<T>() +
                                         " " + text_of(shape) + ", contiguous, on the CPU")
                                            .c_str());
        held_.push_back(tensor);
        return reinterpret_cast<T*>(nanobind::cast<uintptr_t>(tensor.attr("data_ptr")()));
    }

  private:
    std::vector<nanobind::object> held_;
};
