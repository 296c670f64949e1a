// The pool behind parallel_for: workers that wake for one job at a time and share its items by an atomic counter.
//
// An operation is many short jobs, and to wake a thread that sleeps takes as long as some of them. So who waits looks for kPatience
// first, leaving its core to any other thread that wants it, and only then sleeps.
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <unistd.h>
#endif

namespace pyunictokens {
namespace {

long process_id() {
#ifdef _WIN32
  return 0;  // no fork there
#else
  return long(getpid());
#endif
}

constexpr std::chrono::microseconds kPatience{200};

// Looks until `ready` or until kPatience is over.
template <typename Ready>
void look(const Ready& ready) {
  const auto until = std::chrono::steady_clock::now() + kPatience;
  while (!ready() && std::chrono::steady_clock::now() < until) std::this_thread::yield();
}

class Pool {
 public:
  // Runs `work` on the caller and on `helpers` workers; false if another job is running.
  bool run(int helpers, const std::function<void()>& work) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    try {
      for (; workers_ < helpers; ++workers_) std::thread(&Pool::loop, this).detach();
    } catch (const std::system_error&) {
      helpers = workers_;  // the machine grants no more threads: those that are there do the work
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      waiting_seats_ = helpers;
    }
    wake_.notify_all();
    work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      waiting_seats_ = 0;  // workers that have not woken yet are not needed any more
    }
    const auto all_done = [this] { return busy_ == 0; };
    look(all_done);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, all_done);
    work_ = nullptr;
    return true;
  }

 private:
  void loop() {
    const auto wanted = [this] { return waiting_seats_ > 0; };
    for (;;) {
      look(wanted);
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, wanted);
      --waiting_seats_;
      ++busy_;
      const std::function<void()>* work = work_;
      lock.unlock();
      (*work)();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void()>* work_ = nullptr;
  int workers_ = 0;
  std::atomic<int> waiting_seats_{0}, busy_{0};  // written under mutex_
};

// Never destroyed, so that no worker outlives its mutex at exit. A forked child has none of the threads: it gets a new pool.
Pool& pool() {
  static std::mutex mutex;
  static Pool* current = nullptr;
  static long owner = -1;
  std::lock_guard<std::mutex> lock(mutex);
  if (current == nullptr || owner != process_id()) {
    current = new Pool;
    owner = process_id();
  }
  return *current;
}

}  // namespace

void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body) {
  if (count <= 0) return;
  grain = std::max<std::int64_t>(grain, 1);
  const std::int64_t pieces = (count + grain - 1) / grain;
  const int helpers = int(std::min<std::int64_t>(threads, pieces)) - 1;
  std::atomic<std::int64_t> next{0};
  const std::function<void()> work = [&] {
    for (std::int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;)
      body(piece * grain, std::min(count, (piece + 1) * grain));
  };
  if (helpers < 1 || !pool().run(helpers, work)) work();
}

}  // namespace pyunictokens
