"""The pooling operator on the CPU: `scheduling` divides the work, `kernels` do it, built on `intrinsics`."""
