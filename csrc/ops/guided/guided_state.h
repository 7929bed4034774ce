// What arrives at a row and at a column of a rectangle for guided_partial_bwd: four doubles a part. Torch-free.
#pragma once

namespace ltood {

enum { kContrastLse, kContrastPull, kContrastAttract, kContrastFallback };
enum { kDistillStudentLse, kDistillTeacherLse, kDistillPull, kDistillAttract };
constexpr int kStateColumns = 4;

}  // namespace ltood
