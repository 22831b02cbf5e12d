// HS_CLONES compiles a function once per instruction set and lets the loader choose. The sets are named by feature: a
// name such as arch=haswell would ask for that maker's processor, and every other one would get the oldest code. Off
// where the loader cannot choose (other processors) or where a sanitizer is not yet awake when it does.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define HS_CLONES [[gnu::target_clones("avx512f", "avx2", "default")]]
#else
#define HS_CLONES
#endif
