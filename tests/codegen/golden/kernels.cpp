// The kernels of this shared object.
#include "kernel.h"

extern "C" const KvcAttendKernel kvc_attend_1c2586538954d505;
extern "C" const KvcAttendKernel kvc_attend_d9822d1d7f4335ac;
extern "C" const KvcLinearKernel kvc_linear_e411076089bd50d7;

extern "C" __attribute__((visibility("default"))) const KvcKernels *kvc_kernels() {
  // clang-format off: one kernel a line
  static const KvcAttendKernel *const attends[] = {
      &kvc_attend_1c2586538954d505,
      &kvc_attend_d9822d1d7f4335ac,
      nullptr,
  };
  static const KvcLinearKernel *const linears[] = {
      &kvc_linear_e411076089bd50d7,
      nullptr,
  };
  // clang-format on
  static const KvcKernels kernels = {kKernelVersion, attends, 2, linears, 1};
  return &kernels;
}
