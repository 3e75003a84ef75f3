// The GIL, let go while a kernel runs.
//
// While the interpreter shuts down, Python before 3.14 ends a thread that asks for the GIL by pthread_exit. With glibc
// that unwinds the stack: through destructors, which must not throw, so the process would abort; and through owners of
// Python objects, which nobody may touch any more. Such a thread, a daemon of a program that is done, sleeps until the
// process ends, as Python 3.14 makes it do.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace foveal {

class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() { take_back(); }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

  // Runs pending signal handlers, which Python does on its main thread alone. True leaves an exception set.
  bool interrupted() {
    take_back();
    const bool raised = PyErr_CheckSignals() != 0;
    state_ = PyEval_SaveThread();
    return raised;
  }

 private:
  void take_back() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // the unwinding of pthread_exit, which may be caught but not ended
      for (;;) pause();
    }
  }

  PyThreadState* state_;
};

}  // namespace foveal
