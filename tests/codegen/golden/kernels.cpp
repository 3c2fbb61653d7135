// The kernels of this shared object.
#include "kernel.h"

extern "C" const KvcAttendKernel kvc_attend_5427211272b56408;
extern "C" const KvcAttendKernel kvc_attend_98693af4150ad9ec;
extern "C" const KvcAttendKernel kvc_attend_a313bd6bd391429e;
extern "C" const KvcLinearKernel kvc_linear_e411076089bd50d7;
extern "C" const KvcLookupKernel kvc_lookup_3d3f69f163c19a9b;

extern "C" __attribute__((visibility("default"))) const KvcKernels *kvc_kernels() {
  // clang-format off: one kernel a line
  static const KvcAttendKernel *const attends[] = {
      &kvc_attend_5427211272b56408,
      &kvc_attend_98693af4150ad9ec,
      &kvc_attend_a313bd6bd391429e,
      nullptr,
  };
  static const KvcLinearKernel *const linears[] = {
      &kvc_linear_e411076089bd50d7,
      nullptr,
  };
  static const KvcLookupKernel *const lookups[] = {
      &kvc_lookup_3d3f69f163c19a9b,
      nullptr,
  };
  // clang-format on
  static const KvcKernels kernels = {
      kKernelVersion, attends, 3, linears, 1, lookups, 1,
  };
  return &kernels;
}
