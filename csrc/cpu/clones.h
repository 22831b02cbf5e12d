// HS_CLONES compiles a function once per instruction set and lets the loader choose. The sets are named by feature or
// level: a name such as arch=haswell would ask for that maker's processor, and every other one would get the oldest
// code. Off where the loader cannot choose (other processors) or where a sanitizer is not yet awake when it does.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#if defined(__clang__) || __GNUC__ >= 12
#define HS_CLONES [[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")]]
#else
// Levels are unknown to it, and "avx2" would be chosen before "fma", without its products.
#define HS_CLONES [[gnu::target_clones("avx512f", "fma", "default")]]
#endif
#else
#define HS_CLONES
#endif
