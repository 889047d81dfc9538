//! Where kernels come from.
