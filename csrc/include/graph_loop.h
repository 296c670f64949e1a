// A captured step in a loop that the device ends by itself: one launch of a graph whose WHILE node (CUDA 12.4 and newer)
// runs the step as long as an int32 in device memory is not 0 and a number of steps is not used up. It knows graphs; it
// does not know what a step computes, and it owns no memory that a step touches.
#pragma once

#include <cstdint>
#include <string>

namespace pyunictokens {

struct GraphLoop;  // an executable graph and the device it belongs to

// Why this build with this driver cannot make such a graph; empty if it can. Needs no GPU to answer.
std::string graph_loop_objection();

// Builds the loop around `step`, a cudaGraph_t that is copied and stays the caller's. `keep_going` and `left` are int32 in
// the memory of `device`. A launch runs the step while *keep_going != 0 and *left > 0, looking before the first step too,
// and takes 1 from *left for each. Nothing is read back. Returns the runtime's words if it failed, else "" and `made`.
std::string graph_loop_build(void* step, std::int32_t* keep_going, std::int32_t* left, int device, GraphLoop** made);

// Enqueues one run on `stream` (a cudaStream_t). Runs of one loop must not overlap. Returns words, or "".
std::string graph_loop_launch(GraphLoop* loop, void* stream);

// Frees the loop; a run of it must not be under way. nullptr is fine.
void graph_loop_destroy(GraphLoop* loop);

}  // namespace pyunictokens
