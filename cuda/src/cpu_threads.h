// The thread pool of the CPU library: non-spinning, sized by sk_set_threads, survives fork, serves several calling threads at once.
#pragma once
#include <stdint.h>

namespace sk {

int pool_threads();
void set_pool_threads(int threads);

// Runs body(context, task, worker) for every task in [0, tasks); tasks are handed out in order, worker < pool_threads() numbers the
// threads that take part in this call. Returns when all are done.
void run_tasks(int64_t tasks, void (*body)(void*, int64_t, int), void* context);

template <class F> void parallel(int64_t tasks, F&& f) {
  run_tasks(tasks, [](void* c, int64_t task, int worker) { (*(F*)c)(task, worker); }, &f);
}

}  // namespace sk
