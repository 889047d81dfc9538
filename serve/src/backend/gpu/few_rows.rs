//! Products of few rows (`few_rows.cu`). The weight is read once, and the rows stay as they are: by
//! weights of `e4m3`, too, they are not rounded to 8 bits. A norm before a product, and an activation
//! or a sum after it, are parts of the same kernel.

use std::{ffi::c_void, sync::Arc};

use cudarc::{
    driver::{CudaFunction, CudaStream, LaunchConfig, sys},
    nvrtc::Ptx,
};
use flashinfer_rs::{DType, Device, TensorMut, TensorRef};

use super::programmatic;
use crate::{
    Result,
    backend::matmul::{Added, Product, Weight},
    model::architecture::Activation,
};

#[cfg(test)]
mod tests;

/// The most rows.
const ROWS: usize = 8;
/// Rows of the weight that a block reads.
const TILE: usize = 16;
/// Bytes of a weight's row that a thread reads at once.
const READ: usize = 16;
/// Bytes of normed rows up to which it pays that every block norms them for itself.
const MAX_NORMED_BYTES: usize = 20 << 10;
/// Bytes between rows of normed `x` in shared memory that nothing is in.
const PADDING_BYTES: usize = 4 * READ;

/// What else a launch does.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fused<'t> {
    /// Rows are normed before they are multiplied.
    pub norm: Option<RowNorm<'t>>,
    /// Results are what this makes of the first half of the product's, the gates, times its second half.
    pub activation: Option<Activation>,
    /// Results are added to what the output was before.
    pub sum: bool,
}

/// A norm of rows by the roots of their mean squares.
#[derive(Clone, Copy, Debug)]
pub struct RowNorm<'t> {
    /// What is multiplied by, as wide as the rows.
    pub weight: TensorRef<'t>,
    /// What is added to mean squares.
    pub eps: f64,
}

/// What a kernel takes: `Arguments` of `few_rows.cu`.
#[repr(C)]
struct Arguments {
    out: usize,
    weight: usize,
    scales: usize,
    x: usize,
    norm: usize,
    bias: usize,
    rows: u32,
    outputs: u32,
    width: u32,
    activation: u32,
    added: u32,
    wide: u32,
    factor: f32,
    eps: f32,
}

/// How the blocks of a kernel read a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    /// Warps of a block.
    warps: usize,
    /// Vectors that a thread asks for together of each of its rows, and how often at once.
    reads: usize,
    groups: usize,
    /// Blocks of a multiprocessor.
    blocks: usize,
}

/// The shapes of `few_rows.cu`: which is the fastest depends on the product.
const SHAPES: [Shape; 3] = [
    Shape { warps: 16, reads: 4, groups: 2, blocks: 1 },
    Shape { warps: 8, reads: 4, groups: 3, blocks: 2 },
    Shape { warps: 16, reads: 2, groups: 2, blocks: 2 },
];

impl Shape {
    fn threads(self) -> usize {
        32 * self.warps
    }

    /// Bytes of a block's shared memory for what is read of the weight: vectors of two rows of it.
    fn ring_bytes(self) -> usize {
        self.groups * self.reads * 2 * self.threads() * READ
    }

    fn kernel(self, dtype: DType, weights: DType) -> String {
        let Self { warps, reads, groups, .. } = self;
        format!("few_rows_{dtype}_by_{weights}_{warps}x{reads}x{groups}")
    }
}

/// The kernels of one shape.
struct Kernels {
    shape: Shape,
    /// By weights of the same type.
    by_same: CudaFunction,
    /// By weights of `e4m3`.
    by_e4m3: CudaFunction,
}

/// The kernels of one element type, on one stream.
pub struct FewRows {
    cuda: Arc<CudaStream>,
    dtype: DType,
    kernels: Vec<Kernels>,
    multiprocessors: usize,
}

impl FewRows {
    /// Their code.
    pub const PTX: &str = include_str!("few_rows.ptx");

    /// Has them compiled for rows and results of `f16` or `bf16`; `None` if the GPU has no
    /// [programmatic dependent launch](programmatic::is_available), or too little shared memory.
    pub fn new(cuda: &Arc<CudaStream>, dtype: DType) -> Result<Option<Self>> {
        use sys::{CUdevice_attribute as OfDevice, CUfunction_attribute as OfFunction};
        if !programmatic::is_available(cuda)? {
            return Ok(None);
        }
        let attribute = |which| -> Result<usize> { Ok(cuda.context().attribute(which)?.try_into()?) };
        let most = attribute(OfDevice::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let module = cuda.context().load_module(Ptx::from_src(Self::PTX))?;
        let mut kernels = Vec::new();
        for shape in SHAPES {
            let [by_same, by_e4m3] = [dtype, DType::E4M3].map(|weights| -> Result<_> {
                let kernel = module.load_function(&shape.kernel(dtype, weights))?;
                let fixed = kernel.get_attribute(OfFunction::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
                let dynamic = shape.ring_bytes() + MAX_NORMED_BYTES;
                if dynamic + usize::try_from(fixed)? > most {
                    return Ok(None);
                }
                let which = OfFunction::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                kernel.set_attribute(which, dynamic.try_into()?)?;
                // The blocks of two launches that overlap share a multiprocessor.
                let which = OfFunction::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
                kernel.set_attribute(which, 100)?;
                Ok(Some(kernel))
            });
            if let (Some(by_same), Some(by_e4m3)) = (by_same?, by_e4m3?) {
                kernels.push(Kernels { shape, by_same, by_e4m3 });
            }
        }
        let multiprocessors = attribute(OfDevice::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let cuda = cuda.clone();
        Ok((!kernels.is_empty()).then_some(Self { cuda, dtype, kernels, multiprocessors }))
    }

    /// How many kernels there are for each product, which differ in how they read the weight.
    pub fn kernels(&self) -> usize {
        self.kernels.len()
    }

    /// Whether there is a kernel for a product.
    pub fn serves(&self, product: &Product) -> bool {
        let Product { rows, input, added, dtype, out_dtype, .. } = *product;
        let adds_wide = out_dtype == DType::F32 && added != Added::Nothing;
        (dtype == self.dtype || dtype == DType::E4M3)
            && (out_dtype == self.dtype || out_dtype == DType::F32)
            && !adds_wide
            && (input * dtype.size()).is_multiple_of(READ)
            && (1..=ROWS).contains(&rows)
    }

    /// Whether rows of a product can be normed, and that pays.
    pub fn norms(&self, product: &Product) -> bool {
        normed_bytes(product) <= MAX_NORMED_BYTES
    }

    /// As [`Matmul::run`](crate::backend::matmul::Matmul::run) of a product that this
    /// [serves](Self::serves), but with rows of the kernel's type, and with what is fused. With an
    /// activation a row of `out` has half as many numbers as the product has. What `out` was is added
    /// if the product or `fused` says so. `kernel` is one of [`kernels`](Self::kernels), from 0.
    pub fn run(
        &self,
        kernel: usize,
        product: &Product,
        fused: &Fused<'_>,
        out: &mut TensorMut<'_>,
        x: &TensorRef<'_>,
        weight: &Weight<'_>,
    ) -> Result<()> {
        let Product { rows, input, output, factor, added, dtype, out_dtype } = *product;
        let device = Device::Cuda(self.cuda.context().ordinal() as u32);
        let check = |name, tensor: &TensorRef<'_>, dtype, numel| {
            product.check_tensor(name, tensor, dtype, numel, device)
        };
        let Some(Kernels { shape, by_same, by_e4m3 }) =
            self.kernels.get(kernel).filter(|_| self.serves(product))
        else {
            return Err(format!("{product:?} is not one of few rows").into());
        };
        let scales = weight.matrix.scales;
        if scales.is_some() != (dtype == DType::E4M3) {
            return Err(format!("the scales of {product:?} are {scales:?}").into());
        }
        if weight.bias.is_some() != (added == Added::Bias) {
            return Err(format!("the bias of {product:?} is {:?}", weight.bias).into());
        }
        let wide = out_dtype == DType::F32;
        let halved = fused.activation.is_some();
        if (halved && output % 2 != 0)
            || (fused.sum && wide)
            || (fused.norm.is_some() && !self.norms(product))
        {
            return Err(format!("{product:?} cannot have {fused:?}").into());
        }
        let outputs = if halved { output / 2 } else { output };
        check("out", &out.as_ref(), out_dtype, rows * outputs)?;
        check("x", x, self.dtype, rows * input)?;
        check("weight", &weight.matrix.numbers, dtype, input * output)?;
        scales.iter().try_for_each(|scales| check("scales", scales, DType::F32, output))?;
        weight.bias.iter().try_for_each(|bias| check("bias", bias, self.dtype, output))?;
        fused.norm.iter().try_for_each(|norm| check("norm", &norm.weight, self.dtype, input))?;
        let address = |tensor: Option<TensorRef<'_>>| tensor.map_or(0, |it| it.data_ptr().addr());
        let mut arguments = Arguments {
            out: out.data_ptr().addr(),
            weight: weight.matrix.numbers.data_ptr().addr(),
            scales: address(scales),
            x: x.data_ptr().addr(),
            norm: address(fused.norm.map(|norm| norm.weight)),
            bias: address(weight.bias),
            rows: rows.try_into()?,
            outputs: outputs.try_into()?,
            width: (input * dtype.size() / READ).try_into()?,
            activation: match fused.activation {
                None => 0,
                Some(Activation::Silu) => 1,
                Some(Activation::GeluTanh) => 2,
            },
            added: u32::from(fused.sum || added == Added::Output),
            wide: u32::from(wide),
            factor,
            eps: fused.norm.map_or(0.0, |norm| norm.eps as f32),
        };
        let mut arguments: [*mut c_void; 1] = [(&raw mut arguments).cast()];
        let kernel = if dtype == DType::E4M3 { by_e4m3 } else { by_same };
        let results = if halved { TILE / 2 } else { TILE };
        let blocks = outputs.div_ceil(results).min(shape.blocks * self.multiprocessors);
        let normed = if fused.norm.is_some() { normed_bytes(product) } else { 0 };
        let launch = LaunchConfig {
            grid_dim: (blocks.try_into()?, 1, 1),
            block_dim: (shape.threads().try_into()?, 1, 1),
            shared_mem_bytes: (shape.ring_bytes() + normed).try_into()?,
        };
        // SAFETY: the kernel takes these arguments. All that it reads and writes was checked to be
        // there; without a norm, a bias or scales it reads none; its shared memory is as large as
        // it takes for granted. Before it waits, it reads the weight and no more, which nothing
        // writes.
        unsafe { programmatic::launch(&self.cuda, kernel, launch, &mut arguments) }
    }
}

/// Bytes of shared memory for normed rows.
fn normed_bytes(product: &Product) -> usize {
    // Rows are of 16 bits.
    product.rows * (2 * product.input + PADDING_BYTES)
}
