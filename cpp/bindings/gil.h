// The GIL, let go while a kernel runs, and taken in the middle of one.
//
// While the interpreter shuts down, Python before 3.14 ends a thread that asks for the GIL by pthread_exit. With glibc
// that unwinds the stack: through destructors, which must not throw, so the process would abort; and through owners of
// Python objects, which nobody may touch any more. Such a thread, a daemon of a program that is done, sleeps until the
// process ends, as Python 3.14 makes it do.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace foveal {

// Does what asks for the GIL, which the end of the interpreter may make the thread's last act: takes it, or runs Python
// code, NumPy's too, which lets go of it in between. `call` is one call of Python's C interface, and owns nothing.
template <class Call>
auto asking_for_gil(Call call) {
  try {
    return call();
  } catch (...) {  // the unwinding of pthread_exit, which may be caught but not ended
    for (;;) pause();
  }
}

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
    asking_for_gil([this] { PyEval_RestoreThread(state_); });
  }

  PyThreadState* state_;
};

// For a thread that somebody else made let go of it.
class TakenGil {
 public:
  TakenGil() : state_(asking_for_gil(PyGILState_Ensure)) {}
  ~TakenGil() { PyGILState_Release(state_); }
  TakenGil(const TakenGil&) = delete;
  TakenGil& operator=(const TakenGil&) = delete;

 private:
  PyGILState_STATE state_;
};

// To be called before code returns, without the GIL, to somebody else who takes it in a destructor: where the
// interpreter shuts down, only the thread that does so comes back.
inline void stay_if_finalizing() {
#if PY_VERSION_HEX >= 0x030d0000
  const bool finalizing = Py_IsFinalizing() != 0;
#else
  const bool finalizing = _Py_IsFinalizing() != 0;
#endif
  if (finalizing) const TakenGil gil;
}

}  // namespace foveal
