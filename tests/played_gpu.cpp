// A GPU that is played. Tensors of the device `cuda` lie in host memory, and each operator runs its CPU kernel on them;
// what a GPU refuses is refused: tensors of both devices in one operator, and, while `strict` is on, whatever would make
// the host wait for the device. Loaded before torch is imported, so that torch finds a CUDA device; see played_gpu.py.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/NativeFunctions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <set>

namespace {

using at::IntArrayRef;
using at::Tensor;
constexpr auto CUDA = c10::DeviceType::CUDA;
constexpr int NUM_DEVICES = 8;
c10::DeviceIndex current = 0;
bool strict = false;
std::atomic<int64_t> in_use{0}, peak{0};

c10::Device device() { return c10::Device(CUDA, current); }

void count(int64_t bytes) {
  in_use += bytes;
  if (in_use > peak) peak = in_use.load();
}

void wait(const std::string& reason) { TORCH_CHECK(!strict, "called a synchronizing CUDA operation: ", reason); }

// Memory

struct Memory final : public c10::Allocator {
  struct Held {
    void* data;
    int64_t bytes;
  };
  static void release(void* context) {
    auto* held = static_cast<Held*>(context);
    count(-held->bytes);
    c10::GetCPUAllocator()->raw_deallocate(held->data);
    delete held;
  }
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, device()};
    void* data = c10::GetCPUAllocator()->raw_allocate(bytes);
    count(bytes);
    return {data, new Held{data, int64_t(bytes)}, &release, device()};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;

void drop(void* tensor) { delete static_cast<Tensor*>(tensor); }
void drop_counted(void* tensor) {
  count(-int64_t(static_cast<Tensor*>(tensor)->storage().nbytes()));
  drop(tensor);
}

// The same memory as a tensor of the other device; `counted` if it was not the device's before.
Tensor alias(const Tensor& from, c10::Device device, bool counted = false) {
  const auto& storage = from.storage();
  if (counted) count(storage.nbytes());
  c10::DataPtr data(storage.mutable_data(), new Tensor(from), counted ? &drop_counted : &drop, device);
  auto* allocator = device.is_cpu() ? c10::GetCPUAllocator() : &memory;
  auto other = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(), std::move(data), allocator, true);
  c10::DispatchKeySet keys(device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(other), keys, from.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(from.sizes(), from.strides(), from.storage_offset());
  return tensor;
}

Tensor on_host(const Tensor& t) { return t.defined() && t.is_cuda() ? alias(t, c10::kCPU) : t; }

// Operators

struct Call {
  std::vector<std::pair<Tensor, Tensor>> played;  // tensors of the device and their aliases
  std::vector<Tensor> strangers;                  // tensors of the CPU
  bool on_device = false;

  Tensor take(const Tensor& t) {
    if (t.defined() && t.is_cpu()) strangers.push_back(t);
    if (!t.defined() || !t.is_cuda()) return t;
    on_device = true;
    for (auto& [mine, other] : played)
      if (mine.is_same(t)) return other;
    played.emplace_back(t, on_host(t));
    return played.back().second;
  }

  c10::IValue take(const c10::IValue& value) {
    if (value.isTensor()) return take(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(take(t));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : value.toOptionalTensorList().vec())
        list.push_back(t ? std::optional<Tensor>(take(*t)) : t);
      return list;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      on_device = true;
      return c10::Device(c10::kCPU);
    }
    return value;
  }

  Tensor give(const Tensor& t) {
    bool fresh = true;
    for (auto& [mine, other] : played) {
      if (other.is_same(t)) return mine;
      fresh = fresh && !(t.defined() && t.is_alias_of(other));
    }
    return on_device && t.defined() ? alias(t, device(), fresh) : t;
  }

  c10::IValue give(const c10::IValue& value) {
    if (value.isTensor()) return give(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back(give(t));
    return list;
  }

  // What `out=` has resized is the device's too.
  void keep_resized() {
    for (auto& [mine, other] : played) {
      if (other.storage().data() == mine.storage().data() && other.sizes() == mine.sizes()) continue;
      Tensor resized = alias(other, device(), true);
      mine.unsafeGetTensorImpl()->set_storage_keep_dtype(resized.storage());
      mine.unsafeGetTensorImpl()->set_sizes_and_strides(resized.sizes(), resized.strides(), resized.storage_offset());
    }
  }
};

const std::set<std::string> WAITS{"aten::_local_scalar_dense", "aten::equal",         "aten::masked_select",
                                  "aten::nonzero",             "aten::unique_dim",    "aten::_unique2",
                                  "aten::unique_consecutive"};
const std::set<std::string> INDEXED{"aten::index", "aten::index_put_", "aten::_index_put_impl_"};

void check(const std::string& name, const Call& call, const std::vector<c10::IValue>& arguments) {
  const bool indexed = INDEXED.count(name) > 0;
  const auto refuse = [&](const Tensor& t) {
    TORCH_CHECK(!t.is_cpu() || t.dim() == 0, "Expected all tensors to be on the same device, but found at least two, cuda and cpu (",
                name, ", a CPU tensor of sizes ", t.sizes(), ")");
  };
  if (!indexed)
    for (const Tensor& t : call.strangers) refuse(t);
  if (WAITS.count(name) || (name == "aten::repeat_interleave" && arguments.size() > 1 && arguments[1].isNone())) wait(name);
  if (!indexed) return;
  TORCH_CHECK(arguments[0].toTensor().is_cuda(), name, ": indices of the GPU for a tensor of the CPU");
  if (arguments.size() > 2) refuse(arguments[2].toTensor());  // the values
  for (const std::optional<Tensor>& t : arguments[1].toOptionalTensorList().vec()) {
    if (!t || !t->defined()) continue;
    if (t->is_cpu()) wait(name + " by tensors of the CPU");
    if (t->scalar_type() == at::kBool) wait(name + " by a mask");
  }
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto arguments = torch::jit::last(*stack, schema.arguments().size()).vec();
  Call call;
  for (size_t i = 0; i < arguments.size(); ++i)
    (*stack)[stack->size() - arguments.size() + i] = call.take(arguments[i]);
  if (call.on_device) check(schema.name(), call, arguments);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.keep_resized();
  const size_t results = schema.returns().size();
  for (size_t i = stack->size() - results; i < stack->size(); ++i) (*stack)[i] = call.give((*stack)[i]);
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.device() != from.device() && !non_blocking && from.numel()) wait("copy between host and device");
  on_host(to).copy_(on_host(from));
  return to;
}

c10::ScalarType type_of(std::optional<c10::ScalarType> dtype) {
  return dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype()));
}
const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);
using Layout = std::optional<at::Layout>;
using Device = std::optional<at::Device>;
using Type = std::optional<c10::ScalarType>;

Tensor empty(IntArrayRef size, Type dtype, Layout, Device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, type_of(dtype), format);
}
Tensor empty_strided(IntArrayRef size, IntArrayRef stride, Type dtype, Layout, Device, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, type_of(dtype));
}

void resize_storage(const Tensor& t, int64_t bytes) {
  auto* storage = t.storage().unsafeGetStorageImpl();
  auto data = memory.allocate(bytes);
  if (auto kept = std::min<int64_t>(bytes, storage->nbytes())) std::memcpy(data.mutable_get(), storage->data(), kept);
  storage->set_data_ptr_noswap(std::move(data));
  storage->set_nbytes(bytes);
}
const Tensor& resize_(const Tensor& t, IntArrayRef size, std::optional<at::MemoryFormat>) {
  const int64_t bytes = (t.storage_offset() + c10::multiply_integers(size)) * t.itemsize();
  if (int64_t(t.storage().nbytes()) < bytes) resize_storage(t, bytes);
  t.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return t;
}
Tensor& set_source(Tensor& t, at::Storage source) {
  return at::native::set_storage_cpu_(t, source, 0, {int64_t(source.nbytes() / t.itemsize())}, {});
}

// The operator as a whole, as its parts ask for kernels by the type of the device.
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double dropout,
                 bool causal, std::optional<double> scale, bool grouped) {
  const bool traced = q.key_set().has_any(
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize}));
  if (traced || (at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad())))
    return std::get<0>(at::_scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, {}, scale, grouped));
  TORCH_CHECK(k.is_cuda() && v.is_cuda() && (!mask || mask->is_cuda()), "attention to tensors of the CPU");
  const auto host_mask = mask ? std::optional<Tensor>(on_host(*mask)) : mask;
  const auto out = at::scaled_dot_product_attention(on_host(q), on_host(k), on_host(v), host_mask, dropout, causal, scale, grouped);
  return alias(out, device(), true);
}
// The product of 16-bit matrices with a result in 32 bits, which a CPU does not have.
Tensor mm_dtype(const Tensor& a, const Tensor& b, at::ScalarType dtype) {
  TORCH_CHECK(a.is_cuda() && b.is_cuda(), "a product with tensors of the CPU");
  return alias(at::mm(on_host(a).to(dtype), on_host(b).to(dtype)), device(), true);
}

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  using Stream = c10::Stream;
  c10::DeviceType type() const override { return CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  Stream getStream(c10::Device) const override { return Stream(Stream::DEFAULT, device()); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return NUM_DEVICES; }
};

}  // namespace

namespace at {

struct CUDAHooks : public CUDAHooksInterface {  // torch looks for this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return NUM_DEVICES; }
  int getNumGPUs() const override { return NUM_DEVICES; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return current; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return current; }
  bool isPinnedPtr(const void*) const override { return true; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  c10::Device getDeviceFromPtr(void*) const override { return device(); }
  const Generator& getDefaultGenerator(DeviceIndex = -1) const override { return at::detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex = -1) const override { return at::detail::createCPUGenerator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

namespace detail {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("resize_", resize_);
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("set_.source_Storage", set_source);
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("scaled_dot_product_attention", attention);
  m.impl("mm.dtype", mm_dtype);
}
TORCH_LIBRARY_IMPL(aten, AutogradCUDA, m) { m.impl("scaled_dot_product_attention", attention); }

TORCH_LIBRARY(played, m) {
  m.def("on_host(Tensor t) -> Tensor", &on_host);
  m.def("resize_storage(Tensor t, int bytes) -> ()", &resize_storage);
  m.def("set_device(int index) -> ()", [](int64_t index) { current = c10::DeviceIndex(index); });
  m.def("device() -> int", []() { return int64_t(current); });
  m.def("strict(bool on) -> ()", [](bool on) { strict = on; });
  m.def("allocated() -> int", []() { return in_use.load(); });
  m.def("peak() -> int", []() { return peak.load(); });
  m.def("reset_peak() -> ()", []() { peak = in_use.load(); });
}
