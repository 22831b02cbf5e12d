// The C++ API of halfstep for LibTorch programs. Include this and link halfstep::torch; the namespace is halfstep.
#pragma once

#include "halfstep/torch/cross_entropy.h"
#include "halfstep/torch/gradients.h"
#include "halfstep/torch/int8.h"
#include "halfstep/torch/int8_script.h"
#include "halfstep/torch/lower.h"
#include "halfstep/torch/norms.h"
#include "halfstep/torch/operation_counter.h"
#include "halfstep/torch/optimizer.h"
#include "halfstep/torch/policy.h"
#include "halfstep/torch/scale_gradient.h"
#include "halfstep/torch/scaling.h"
#include "halfstep/torch/scopes.h"
#include "halfstep/torch/stability.h"
