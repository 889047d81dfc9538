//! Products of few rows by weights of `e4m3` (`few_rows.cu`). The weight is read once, and the rows
//! stay as they are: they are not rounded to 8 bits.

use std::{ptr, sync::Arc};

use cudarc::{
    driver::{CudaFunction, CudaStream, LaunchConfig, PushKernelArg},
    nvrtc::Ptx,
};
use flashinfer_rs::{DType, Device, TensorMut, TensorRef};

use crate::{
    Result,
    backend::matmul::{Added, Product, Weight},
};

/// Threads of a block.
const THREADS: u32 = 256;
/// Rows that there are kernels for.
const ROWS: [usize; 4] = [1, 2, 4, 8];
/// Rows of the weight that a block reads: two for each warp.
const OUTPUTS: usize = 2 * THREADS as usize / 32;
/// Numbers that a thread reads at once.
const VECTOR: usize = 16;

/// The kernels of one element type, on one stream.
pub struct FewRows {
    cuda: Arc<CudaStream>,
    dtype: DType,
    /// For each of [`ROWS`].
    kernels: Vec<CudaFunction>,
}

impl FewRows {
    /// Has them compiled for rows and results of `f16` or `bf16`.
    ///
    /// # Errors
    /// The GPU has no 8-bit floats: its compute capability is below 8.9.
    pub fn new(cuda: &Arc<CudaStream>, dtype: DType) -> Result<Self> {
        let module = cuda.context().load_module(Ptx::from_src(include_str!("few_rows.ptx")))?;
        let kernel = |rows| module.load_function(&format!("few_rows_{dtype}_{rows}"));
        let kernels = ROWS.iter().map(kernel).collect::<Result<_, _>>()?;
        Ok(Self { cuda: cuda.clone(), dtype, kernels })
    }

    /// Whether there is a kernel for a product.
    pub fn serves(&self, product: &Product) -> bool {
        let multiple = product.input.is_multiple_of(VECTOR);
        product.dtype == DType::E4M3
            && product.out_dtype == self.dtype
            && multiple
            && ROWS.contains(&product.rows)
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
        let Product { rows, input, output, factor, added, .. } = *product;
        let device = Device::Cuda(self.cuda.context().ordinal() as u32);
        let check = |name, tensor: &TensorRef<'_>, dtype, numel| {
            product.check_tensor(name, tensor, dtype, numel, device)
        };
        let kernel = ROWS.iter().position(|&of| of == rows).filter(|_| self.serves(product));
        let (Some(kernel), Some(scales)) = (kernel, weight.matrix.scales) else {
            return Err(format!("{product:?} is not one of few rows by a weight with scales").into());
        };
        if weight.bias.is_some() != (added == Added::Bias) {
            return Err(format!("the bias of {product:?} is {:?}", weight.bias).into());
        }
        check("out", &out.as_ref(), self.dtype, rows * output)?;
        check("x", x, self.dtype, rows * input)?;
        check("weight", &weight.matrix.numbers, DType::E4M3, input * output)?;
        check("scales", &scales, DType::F32, output)?;
        weight.bias.iter().try_for_each(|bias| check("bias", bias, self.dtype, output))?;
        let bias = weight.bias.map_or(ptr::null_mut(), |bias| bias.data_ptr());
        let data = [out.data_ptr(), weight.matrix.numbers.data_ptr(), scales.data_ptr(), x.data_ptr(), bias];
        let data = data.map(|data| data as u64);
        let sizes = [u32::try_from(output)?, u32::try_from(input / VECTOR)?];
        let added = match added {
            Added::Nothing => 0u32,
            Added::Bias => 1,
            Added::Output => 2,
        };
        let blocks = u32::try_from(output.div_ceil(OUTPUTS))?;
        let shape =
            LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        let mut launch = self.cuda.launch_builder(&self.kernels[kernel]);
        for address in &data {
            launch.arg(address);
        }
        for size in &sizes {
            launch.arg(size);
        }
        launch.arg(&factor).arg(&added);
        // SAFETY: the kernel takes five addresses, rows of the weight, a width in sixteens, a
        // factor and what is added. All that it reads and writes was checked to be there; without
        // a bias it reads none.
        unsafe { launch.launch(shape)? };
        Ok(())
    }
}
