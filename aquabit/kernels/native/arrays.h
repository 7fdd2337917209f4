// Tensors that Python hands over, as attributes of an object: read by name, their shape and kind checked, and held for as
// long as what points to them. For the baseline only: never included in a level.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
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

inline Shape shape_of(nanobind::handle owner, const char* name) {
    Shape shape;
    for (nanobind::handle size : owner.attr(name).attr("shape")) shape.push_back(nanobind::cast<int64_t>(size));
    return shape;
}

class Arrays {
  public:
    // The tensor ``name`` of ``owner``, null where that is None; raises ValueError for another shape or kind than these.
    template <class T>
    T* take(nanobind::handle owner, const char* name, const Shape& shape) {
        const nanobind::object tensor = owner.attr(name);
        if (tensor.is_none()) return nullptr;
        nanobind::ndarray<nanobind::device::cpu> array;
        // Of what carries a gradient, and of what has no memory, torch gives none away.
        const bool read = nanobind::try_cast(nanobind::object(tensor.attr("detach")()), array);
        if (!read || array.dtype() != nanobind::dtype<T>() || !holds(array, shape)) {
            const nanobind::object kind = tensor.attr("dtype");
            throw nanobind::value_error((std::string(name) + " is " + nanobind::str(kind).c_str() + " " + text_of(shape_of(owner, name)) +
                                         "; needed is " + kind_of<T>() + " " + text_of(shape) + ", contiguous, on the CPU")
                                            .c_str());
        }
        held_.push_back(array);
        return static_cast<T*>(array.data());
    }

  private:
    static bool holds(const nanobind::ndarray<nanobind::device::cpu>& array, const Shape& shape) {
        bool equal = array.ndim() == shape.size(), empty = false;
        for (size_t i = 0; equal && i < shape.size(); ++i) {
            equal = static_cast<int64_t>(array.shape(i)) == shape[i];
            empty |= shape[i] == 0;
        }
        int64_t stride = 1;
        for (size_t i = shape.size(); equal && !empty && i-- > 0; stride *= shape[i]) equal = shape[i] == 1 || array.stride(i) == stride;
        return equal;
    }

    std::vector<nanobind::ndarray<nanobind::device::cpu>> held_;
};
