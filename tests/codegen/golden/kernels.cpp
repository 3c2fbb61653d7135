// The kernels of this shared object.
#include "kernel.h"

extern "C" const KvcAttendKernel kvc_attend_11e40466c8cbaad5;
extern "C" const KvcAttendKernel kvc_attend_1531d94e2b84fd53;
extern "C" const KvcAttendKernel kvc_attend_de4180dfde2a5c24;
extern "C" const KvcAttendKernel kvc_attend_ee98081457ce8a96;
extern "C" const KvcLinearKernel kvc_linear_e411076089bd50d7;
extern "C" const KvcLookupKernel kvc_lookup_3d3f69f163c19a9b;

extern "C" __attribute__((visibility("default"))) const KvcKernels *kvc_kernels() {
  // clang-format off: one kernel a line
  static const KvcAttendKernel *const attends[] = {
      &kvc_attend_11e40466c8cbaad5,
      &kvc_attend_1531d94e2b84fd53,
      &kvc_attend_de4180dfde2a5c24,
      &kvc_attend_ee98081457ce8a96,
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
      kKernelVersion, attends, 4, linears, 1, lookups, 1,
  };
  return &kernels;
}
