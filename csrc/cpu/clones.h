// HS_CLONES compiles a function once per instruction set and lets the loader choose. Off where the loader cannot
// (other processors) or where a sanitizer is not yet awake when the choice is made.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define HS_CLONES [[gnu::target_clones("arch=skylake-avx512", "arch=haswell", "default")]]
#else
#define HS_CLONES
#endif
