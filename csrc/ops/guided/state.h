// Constants and layouts of the guided family that CPU and CUDA share. Torch-free.
#pragma once

namespace ltood {

// How hard the guide lets two rows attract or repel: ((1 ± cos) / 2) ^ gamma with gamma > 0, or 1.
struct Force {
  bool weighted;
  double gamma;
};

// The four doubles of a loss that guided_partial_bwd takes for every row and column.
enum { kContrastLse, kContrastGradLse, kContrastAttract, kContrastFallback };
enum { kDistillStudentLse, kDistillTeacherLse, kDistillGradLse, kDistillAttract };
constexpr int kStateColumns = 4;

}  // namespace ltood
