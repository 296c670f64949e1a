// The graph of graph_loop.h:  look → WHILE { step → count and look }.  The kernel that looks sets the node's condition from
// device memory, so no step waits for the host.
//
// Handles of graphs are the driver's own, so the step may come from another copy of the CUDA runtime (torch's).
#include <cuda_runtime.h>

#include "graph_loop.h"

namespace pyunictokens {

struct GraphLoop {
  cudaGraphExec_t run = nullptr;
  int device = 0;
};

#if CUDART_VERSION >= 12040

namespace {

// Before the first step `taken` is 0: only the condition is set.
__global__ void look(cudaGraphConditionalHandle condition, const std::int32_t* keep_going, std::int32_t* left,
                     std::int32_t taken) {
  const std::int32_t now = *left - taken;
  *left = now;
  cudaGraphSetConditional(condition, *keep_going != 0 && now > 0 ? 1u : 0u);
}

cudaError_t add_look(cudaGraph_t graph, const cudaGraphNode_t* after, cudaGraphConditionalHandle condition,
                     std::int32_t* keep_going, std::int32_t* left, std::int32_t taken, cudaGraphNode_t* made) {
  void* arguments[] = {&condition, &keep_going, &left, &taken};
  cudaKernelNodeParams kernel = {};
  kernel.func = reinterpret_cast<void*>(look);
  kernel.gridDim = dim3(1);
  kernel.blockDim = dim3(1);
  kernel.kernelParams = arguments;
  return cudaGraphAddKernelNode(made, graph, after, after ? 1 : 0, &kernel);
}

cudaError_t add_while(cudaGraph_t graph, const cudaGraphNode_t* after, cudaGraphConditionalHandle condition,
                      cudaGraph_t* body) {
  cudaGraphNodeParams parameters = {};
  parameters.type = cudaGraphNodeTypeConditional;
  parameters.conditional.handle = condition;
  parameters.conditional.type = cudaGraphCondTypeWhile;
  parameters.conditional.size = 1;
  cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
  const cudaError_t status = cudaGraphAddNode(&node, graph, after, nullptr, 1, &parameters);
#else
  const cudaError_t status = cudaGraphAddNode(&node, graph, after, 1, &parameters);
#endif
  if (status == cudaSuccess) *body = parameters.conditional.phGraph_out[0];
  return status;
}

cudaError_t fill(cudaGraph_t graph, cudaGraph_t step, std::int32_t* keep_going, std::int32_t* left) {
  cudaGraphConditionalHandle condition;
  cudaGraphNode_t first, inner, last;
  cudaGraph_t body;
  // No default value: the first kernel sets the condition at every launch.
  cudaError_t status = cudaGraphConditionalHandleCreate(&condition, graph, 0, 0);
  if (status == cudaSuccess) status = add_look(graph, nullptr, condition, keep_going, left, 0, &first);
  if (status == cudaSuccess) status = add_while(graph, &first, condition, &body);
  if (status == cudaSuccess) status = cudaGraphAddChildGraphNode(&inner, body, nullptr, 0, step);
  if (status == cudaSuccess) status = add_look(body, &inner, condition, keep_going, left, 1, &last);
  return status;
}

// Makes `device` current for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    status_ = cudaGetDevice(&before_);
    if (status_ == cudaSuccess && before_ != device) {
      status_ = cudaSetDevice(device);
      moved_ = status_ == cudaSuccess;
    }
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  bool moved_ = false;
  cudaError_t status_ = cudaSuccess;
};

std::string words(cudaError_t status) {
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // this failure is answered here; nobody later should meet it
  return cudaGetErrorString(status);
}

}  // namespace

std::string graph_loop_objection() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    return "no CUDA driver";
  }
  if (driver < 12040)
    return "the driver serves CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
           "; a loop in a graph needs 12.4";
  return "";
}

std::string graph_loop_build(void* step, std::int32_t* keep_going, std::int32_t* left, int device, GraphLoop** made) {
  *made = nullptr;
  const OnDevice current(device);
  if (current.status() != cudaSuccess) return words(current.status());
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t run = nullptr;
  cudaError_t status = cudaGraphCreate(&graph, 0);
  if (status == cudaSuccess) status = fill(graph, static_cast<cudaGraph_t>(step), keep_going, left);
  if (status == cudaSuccess) status = cudaGraphInstantiate(&run, graph, 0);
  if (graph != nullptr) cudaGraphDestroy(graph);  // the executable graph does not need it
  if (status != cudaSuccess) return words(status);
  *made = new GraphLoop{run, device};
  return "";
}

std::string graph_loop_launch(GraphLoop* loop, void* stream) {
  const OnDevice current(loop->device);
  if (current.status() != cudaSuccess) return words(current.status());
  return words(cudaGraphLaunch(loop->run, static_cast<cudaStream_t>(stream)));
}

void graph_loop_destroy(GraphLoop* loop) {
  if (loop == nullptr) return;
  const OnDevice current(loop->device);
  if (cudaGraphExecDestroy(loop->run) != cudaSuccess) cudaGetLastError();
  delete loop;
}

#else  // an older toolkit: everything answers, nothing can be made

std::string graph_loop_objection() {
  return "the compiled core was built with CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
         std::to_string(CUDART_VERSION % 1000 / 10) + "; a loop in a graph needs 12.4";
}

std::string graph_loop_build(void*, std::int32_t*, std::int32_t*, int, GraphLoop** made) {
  *made = nullptr;
  return graph_loop_objection();
}

std::string graph_loop_launch(GraphLoop*, void*) { return graph_loop_objection(); }

void graph_loop_destroy(GraphLoop*) {}

#endif

}  // namespace pyunictokens
