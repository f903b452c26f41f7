// Entry points of cpu_train.cpp; arguments as in splatkit.h.
#pragma once
#include "sk/adam.h"

namespace sk {

void l1_ssim(int width, int height, const real* image, const real* target, const real* mask, double ssim_weight, double* terms, real* v_image);
// corrections [T,2] of the row_steps [n], or null: then those of all rows are correct1, correct2.
void adam_rows(int64_t n, int columns, real* param, const real* grad, real* m, real* v, const real* rates, const AdamStep<real>& step, int attribute, real correct1, real correct2, const real* corrections, const int32_t* row_steps, const int32_t* visible);
void mcmc_noise_rows(int64_t n, real* means, const real* quats, const real* log_scales, const real* logits, const real* noise, real scale);
void relocate_rows(int64_t m, real* logits, real* log_scales, const int32_t* copies);

}  // namespace sk
