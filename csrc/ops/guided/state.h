// What arrives at a row and at a column of a partial problem for guided_partial_bwd: four doubles a part. Torch-free.
#pragma once

namespace ltood {

enum { kContrastLse, kContrastGradLse, kContrastAttract, kContrastFallback };
enum { kDistillStudentLse, kDistillTeacherLse, kDistillGradLse, kDistillAttract };
constexpr int kStateColumns = 4;

}  // namespace ltood
