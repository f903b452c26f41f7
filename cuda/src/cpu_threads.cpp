#include "cpu_threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace sk {
namespace {

// Moments that decay towards 0 become denormal, and each one costs about 150 cycles: treat them as 0 inside our loops.
struct FlushDenormals {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(before | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

struct Job {
  void (*body)(void*, int64_t, int);
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  int joined = 1, active = 0, most;   // guarded by the pool's mutex; worker 0 is the caller
};

struct Pool {
  std::mutex mutex;
  std::condition_variable work, done;
  std::vector<Job*> jobs;
  int workers = 0;

  static void drain(Job& job, int worker) {
    FlushDenormals flush;
    for (int64_t t; (t = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;) job.body(job.context, t, worker);
  }

  Job* open_job() {
    for (Job* j : jobs)
      if (j->joined < j->most && j->next.load(std::memory_order_relaxed) < j->tasks) return j;
    return nullptr;
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      Job* job;
      work.wait(lock, [&] { return (job = open_job()) != nullptr; });
      const int worker = job->joined++;
      job->active++;
      lock.unlock();
      drain(*job, worker);
      lock.lock();
      if (--job->active == 0) done.notify_all();
    }
  }

  void run(Job& job) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      for (; workers < job.most - 1; workers++) std::thread([this] { serve(); }).detach();
      jobs.push_back(&job);
    }
    work.notify_all();
    drain(job, 0);
    std::unique_lock<std::mutex> lock(mutex);
    for (size_t i = 0; i < jobs.size(); i++)
      if (jobs[i] == &job) jobs.erase(jobs.begin() + i--);
    done.wait(lock, [&] { return job.active == 0; });
  }
};

std::atomic<int> wanted{1};
std::atomic<Pool*> pool{nullptr};

// Never freed: its threads may outlive every static object. A forked child has none of them, so it starts a pool of its own.
Pool& the_pool() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); }); });
  Pool* p = pool.load();
  if (!p) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(p, fresh)) return *fresh;
    delete fresh;
  }
  return *p;
}

}  // namespace

int pool_threads() { return wanted.load(); }
void set_pool_threads(int threads) { wanted.store(threads < 1 ? 1 : threads > 256 ? 256 : threads); }

void run_tasks(int64_t tasks, void (*body)(void*, int64_t, int), void* context) {
  if (tasks <= 0) return;
  const int64_t threads = pool_threads();
  Job job;
  job.body = body;
  job.context = context;
  job.tasks = tasks;
  job.most = (int)(threads < tasks ? threads : tasks);
  if (job.most <= 1)
    Pool::drain(job, 0);
  else
    the_pool().run(job);
}

}  // namespace sk
