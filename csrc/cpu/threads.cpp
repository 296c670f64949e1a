// The pool behind parallel_for: sleeping workers that wake for one job at a time and share its items by an atomic counter.
#include "threads.h"

#include <algorithm>
#include <atomic>
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
    std::unique_lock<std::mutex> lock(mutex_);
    waiting_seats_ = 0;  // workers that have not woken yet are not needed any more
    done_.wait(lock, [this] { return busy_ == 0; });
    work_ = nullptr;
    return true;
  }

 private:
  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return waiting_seats_ > 0; });
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
  int workers_ = 0, waiting_seats_ = 0, busy_ = 0;
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
