// The kernels of this shared object.
#include "kernel.h"

extern "C" const KvcAttendKernel kvc_attend_3b417f00aa38bbdf;
extern "C" const KvcAttendKernel kvc_attend_47c5df2ab65d9294;
extern "C" const KvcLinearKernel kvc_linear_e411076089bd50d7;

extern "C" __attribute__((visibility("default"))) const KvcKernels *kvc_kernels() {
  // clang-format off: one kernel a line
  static const KvcAttendKernel *const attends[] = {
      &kvc_attend_3b417f00aa38bbdf,
      &kvc_attend_47c5df2ab65d9294,
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
