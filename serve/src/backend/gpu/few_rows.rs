//! Products of few rows (`few_rows.cu`). The weight is read once, and the rows stay as they are: by
//! weights of `e4m3`, too, they are not rounded to 8 bits.

use std::{ffi::c_void, ptr, sync::Arc};

use cudarc::{
    driver::{CudaFunction, CudaStream, LaunchConfig},
    nvrtc::Ptx,
};
use flashinfer_rs::{DType, Device, TensorMut, TensorRef};

use super::programmatic;
use crate::{
    Result,
    backend::matmul::{Added, Product, Weight},
};

/// Threads of a block.
const THREADS: u32 = 256;
/// The most rows.
const ROWS: usize = 8;
/// Rows of the weight that a block reads.
const TILE: usize = 16;
/// Bytes of a weight's row that a thread reads at once.
const READ: usize = 16;

/// The kernels of one element type, on one stream.
pub struct FewRows {
    cuda: Arc<CudaStream>,
    dtype: DType,
    /// By weights of the same type.
    by_same: CudaFunction,
    /// By weights of `e4m3`.
    by_e4m3: CudaFunction,
}

impl FewRows {
    /// Has them compiled for rows and results of `f16` or `bf16`.
    ///
    /// # Errors
    /// The GPU has no [programmatic dependent launch](programmatic::is_available).
    pub fn new(cuda: &Arc<CudaStream>, dtype: DType) -> Result<Self> {
        let module = cuda.context().load_module(Ptx::from_src(include_str!("few_rows.ptx")))?;
        let kernel = |weights: DType| module.load_function(&format!("few_rows_{dtype}_by_{weights}"));
        Ok(Self { cuda: cuda.clone(), dtype, by_same: kernel(dtype)?, by_e4m3: kernel(DType::E4M3)? })
    }

    /// Whether there is a kernel for a product.
    pub fn serves(&self, product: &Product) -> bool {
        let of_weights = product.dtype == self.dtype || product.dtype == DType::E4M3;
        of_weights
            && product.out_dtype == self.dtype
            && (product.input * product.dtype.size()).is_multiple_of(READ)
            && (1..=ROWS).contains(&product.rows)
    }

    /// As [`Matmul::run`](crate::backend::matmul::Matmul::run) of a product that this
    /// [serves](Self::serves), but with rows of the kernel's type, as the results are.
    pub fn run(
        &self,
        product: &Product,
        out: &mut TensorMut<'_>,
        x: &TensorRef<'_>,
        weight: &Weight<'_>,
    ) -> Result<()> {
        let Product { rows, input, output, factor, added, dtype, .. } = *product;
        let device = Device::Cuda(self.cuda.context().ordinal() as u32);
        let check = |name, tensor: &TensorRef<'_>, dtype, numel| {
            product.check_tensor(name, tensor, dtype, numel, device)
        };
        if !self.serves(product) {
            return Err(format!("{product:?} is not one of few rows").into());
        }
        let scales = weight.matrix.scales;
        if scales.is_some() != (dtype == DType::E4M3) {
            return Err(format!("the scales of {product:?} are {scales:?}").into());
        }
        if weight.bias.is_some() != (added == Added::Bias) {
            return Err(format!("the bias of {product:?} is {:?}", weight.bias).into());
        }
        check("out", &out.as_ref(), self.dtype, rows * output)?;
        check("x", x, self.dtype, rows * input)?;
        check("weight", &weight.matrix.numbers, dtype, input * output)?;
        scales.iter().try_for_each(|scales| check("scales", scales, DType::F32, output))?;
        weight.bias.iter().try_for_each(|bias| check("bias", bias, self.dtype, output))?;
        let address = |tensor: Option<TensorRef<'_>>| tensor.map_or(ptr::null_mut(), |it| it.data_ptr());
        let [mut out, mut numbers, mut scales, mut x, mut bias] = [
            out.data_ptr(),
            weight.matrix.numbers.data_ptr(),
            address(scales),
            x.data_ptr(),
            address(weight.bias),
        ];
        let [mut rows, mut outputs, mut width] =
            [u32::try_from(rows)?, u32::try_from(output)?, u32::try_from(input * dtype.size() / READ)?];
        let (mut factor, mut added) = (
            factor,
            match added {
                Added::Nothing => 0u32,
                Added::Bias => 1,
                Added::Output => 2,
            },
        );
        let mut arguments: [*mut c_void; 10] = [
            (&raw mut out).cast(),
            (&raw mut numbers).cast(),
            (&raw mut scales).cast(),
            (&raw mut x).cast(),
            (&raw mut bias).cast(),
            (&raw mut rows).cast(),
            (&raw mut outputs).cast(),
            (&raw mut width).cast(),
            (&raw mut factor).cast(),
            (&raw mut added).cast(),
        ];
        let kernel = if dtype == DType::E4M3 { &self.by_e4m3 } else { &self.by_same };
        let grid_dim = (u32::try_from(output.div_ceil(TILE))?, 1, 1);
        let shape = LaunchConfig { grid_dim, block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the kernel takes five addresses, rows, rows of the weight, their width in reads, a
        // factor and what is added. All that it reads and writes was checked to be there; without
        // a bias or scales it reads none. Before it waits, it reads the weight and no more, which
        // nothing writes.
        unsafe { programmatic::launch(&self.cuda, kernel, shape, &mut arguments) }
    }
}
