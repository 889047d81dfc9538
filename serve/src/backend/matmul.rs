//! Products of activations and weights, by cuBLASLt.
//!
//! What cuBLASLt needs to be told about a product is made once for each shape:
//! descriptors, and the algorithm, which is the first that it suggests or the
//! fastest of several. A call then only enqueues kernels.
//!
//! An algorithm that adds up in one order, whatever the number of rows, gives a row the
//! same results alone and among others. [`Choice::AnyRows`] is such a one.
//!
//! Factors of `e4m3` have a scale for each row of activations, and for each row of the
//! weight, by which the results are multiplied. Hopper's GPUs have such products.

use std::{ffi::c_void, rc::Rc, sync::Arc};

use cudarc::{
    cublaslt::{result, sys},
    driver::CudaStream,
};
use flashinfer_rs::{DType, Device, Stream, TensorMut, TensorRef};

use crate::{Result, backend::graph};

/// Algorithms of a product that are tried.
const CANDIDATES: usize = 48;
/// Launches of each, of which the fastest counts; but one alone if that takes so many times as long as
/// the best.
const LAUNCHES: usize = 5;
const HOPELESS: f32 = 1.1;
/// What cuBLASLt assumes of addresses unless told otherwise.
const ALIGNMENT: usize = 256;
/// Where a bias lies.
const BIAS: Attribute = Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
/// Where the scales of a weight lie, which is cuBLASLt's first factor.
const WEIGHT_SCALES: Attribute = Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER;
/// Where the scales of rows lie.
const X_SCALES: Attribute = Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER;
/// `CUBLAS_OP_T`.
const TRANSPOSED: i32 = 1;
/// `CUBLASLT_EPILOGUE_BIAS`: a vector is added to each row of the results.
const ADD_BIAS: u32 = 4;
/// `CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F`: a number of `f32` for each row.
const SCALE_OF_EACH_ROW: u32 = 3;
/// `CUBLASLT_REDUCTION_SCHEME_NONE`: sums are not made in parts.
const NO_REDUCTION: u32 = 0;
/// `CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE`: parts of sums are kept in `f32`, and
/// added in an order that does not change.
const REDUCTION_IN_F32: u32 = 2;
/// What widths of products of 8 bits are multiples of.
const E4M3_MULTIPLE: usize = 16;
/// Rows for which an algorithm of any number of rows is suggested.
const USUAL_ROWS: usize = 64;

/// cuBLASLt on one stream.
pub struct CublasLt {
    handle: sys::cublasLtHandle_t,
    cuda: Arc<CudaStream>,
}

impl CublasLt {
    /// Opens cuBLASLt by its name, which finds the one that is in the process.
    pub fn new(cuda: &Arc<CudaStream>) -> Result<Rc<Self>> {
        // SAFETY: opening a library of NVIDIA's runs nothing but its initializers.
        if !unsafe { sys::is_culib_present() } {
            return Err("cuBLASLt is not of the CUDA version that cudarc was built for".into());
        }
        cuda.context().bind_to_thread()?;
        Ok(Rc::new(Self { handle: result::create_handle()?, cuda: cuda.clone() }))
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: the handle is this value's, and nothing uses it any more.
        // There is nobody to tell that it could not be freed.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// A description that cuBLASLt allocated.
struct Described<T: Copy> {
    raw: T,
    destroy: unsafe fn(T) -> std::result::Result<(), result::CublasError>,
}

impl<T: Copy> Drop for Described<T> {
    fn drop(&mut self) {
        // SAFETY: it was made by the function's counterpart, and is dropped once.
        let _ = unsafe { (self.destroy)(self.raw) };
    }
}

type Layout = Described<sys::cublasLtMatrixLayout_t>;
type Algorithm = sys::cublasLtMatmulHeuristicResult_t;

/// `[rows, columns]`, one row after the other. For cuBLASLt, columns are what
/// lies together.
fn layout(dtype: sys::cudaDataType, rows: usize, columns: usize) -> Result<Layout> {
    let raw = result::create_matrix_layout(dtype, columns as u64, rows as u64, columns as i64)?;
    Ok(Layout { raw, destroy: result::destroy_matrix_layout })
}

fn data_type(dtype: DType) -> Result<sys::cudaDataType> {
    match dtype {
        DType::F16 => Ok(sys::cudaDataType::CUDA_R_16F),
        DType::BF16 => Ok(sys::cudaDataType::CUDA_R_16BF),
        DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
        DType::E4M3 => Ok(sys::cudaDataType::CUDA_R_8F_E4M3),
        other => Err(format!("products of {other} are not computed").into()),
    }
}

type Descriptor = Described<sys::cublasLtMatmulDesc_t>;
type Attribute = sys::cublasLtMatmulDescAttributes_t;

/// Sets an attribute of a description.
///
/// # Safety
/// The attribute is of type `T`.
unsafe fn set<T>(descriptor: &Descriptor, attribute: Attribute, value: T) -> Result<()> {
    // SAFETY: the descriptor is alive, and so much is read of the value before this returns.
    unsafe {
        let data = (&raw const value).cast();
        result::set_matmul_desc_attribute(descriptor.raw, attribute, data, size_of::<T>())?;
    }
    Ok(())
}

/// Has products of this description find a vector at an address.
fn set_pointer(descriptor: &Descriptor, attribute: Attribute, data: *const c_void) -> Result<()> {
    // SAFETY: the attributes that are set here are pointers, which are only read when the
    // product runs.
    unsafe { set(descriptor, attribute, data) }
}

/// A description of products of factors of this type, with what is added to their results.
fn describe(dtype: DType, added: Added) -> Result<Descriptor> {
    let descriptor = Descriptor {
        raw: result::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType::CUDA_R_32F,
        )?,
        destroy: result::destroy_matmul_desc,
    };
    // Algorithms are sought for vectors that are somewhere; nothing reads them.
    let somewhere = std::ptr::without_provenance(ALIGNMENT);
    // SAFETY: this attribute is an `i32`; those below are `u32`.
    unsafe { set(&descriptor, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, TRANSPOSED)? };
    if added == Added::Bias {
        // SAFETY: as above.
        unsafe { set(&descriptor, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, ADD_BIAS)? };
        set_pointer(&descriptor, BIAS, somewhere)?;
    }
    if dtype == DType::E4M3 {
        for (mode, pointer) in [
            (Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, WEIGHT_SCALES),
            (Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, X_SCALES),
        ] {
            // SAFETY: as above.
            unsafe { set(&descriptor, mode, SCALE_OF_EACH_ROW)? };
            set_pointer(&descriptor, pointer, somewhere)?;
        }
    }
    Ok(descriptor)
}

/// What is multiplied: rows `[rows, input]` by a weight `[output, input]`, in `f32`.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    pub rows: usize,
    pub input: usize,
    pub output: usize,
    /// The results are multiplied by it before a bias is added and they are
    /// rounded.
    pub factor: f32,
    /// What the results are added to, if anything.
    pub added: Added,
    /// The type of rows and weights: `f16`, `bf16`, or `e4m3` with scales, for which `input`
    /// and `output` are multiples of 16.
    pub dtype: DType,
    /// The type of results and bias: `f16`, `bf16`, or without a bias `f32`.
    pub out_dtype: DType,
}

impl Product {
    /// Refuses a tensor that is not what the product has there.
    pub fn check_tensor(
        &self,
        name: &str,
        tensor: &TensorRef<'_>,
        dtype: DType,
        numel: usize,
        device: Device,
    ) -> Result<()> {
        let aligned = (tensor.data_ptr() as usize).is_multiple_of(ALIGNMENT);
        let fits = tensor.dtype() == dtype && tensor.numel() == numel && tensor.device() == device;
        match fits && aligned && tensor.is_contiguous() {
            true => Ok(()),
            false => Err(format!("{name} of {self:?} is {tensor:?}").into()),
        }
    }
}

/// What results are added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    Nothing,
    /// A bias, the same for each row.
    Bias,
    /// What the output was before.
    Output,
}

/// How the algorithm of a product is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The first that is suggested for the number of rows, until it is
    /// [tuned](Matmul::tune).
    Fastest,
    /// The same for all numbers of rows up to this one: a row's results are the same
    /// whatever rows are beside it.
    AnyRows(usize),
}

/// A factor of a product: a matrix of any shape, row after row.
#[derive(Clone, Copy, Debug)]
pub struct Factor<'t> {
    /// Its elements.
    pub numbers: TensorRef<'t>,
    /// If they are `e4m3`, what those of each row are multiplied by, `f32`.
    pub scales: Option<TensorRef<'t>>,
}

impl<'t> From<TensorRef<'t>> for Factor<'t> {
    fn from(numbers: TensorRef<'t>) -> Self {
        Self { numbers, scales: None }
    }
}

/// What rows are multiplied by.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'t> {
    /// `[output, input]`.
    pub matrix: Factor<'t>,
    /// `output` elements of the results' type.
    pub bias: Option<TensorRef<'t>>,
}

/// A product that is ready to run.
pub struct Matmul {
    cublas: Rc<CublasLt>,
    product: Product,
    descriptor: Descriptor,
    weight: Layout,
    x: Layout,
    out: Layout,
    algorithms: Vec<Algorithm>,
    chosen: usize,
    tuned: bool,
}

impl Matmul {
    /// Takes the algorithm that cuBLASLt suggests first, among those that need
    /// no more than `scratch` bytes.
    pub fn new(cublas: &Rc<CublasLt>, product: Product, choice: Choice, scratch: usize) -> Result<Self> {
        let Product { rows, input, output, .. } = product;
        if product.dtype == DType::E4M3 && !(input | output).is_multiple_of(E4M3_MULTIPLE) {
            let problem = format!("products of e4m3 have sizes that are multiples of {E4M3_MULTIPLE}");
            return Err(format!("{problem}; the model has one of {input} by {output}").into());
        }
        let (dtype, out_dtype) = (data_type(product.dtype)?, data_type(product.out_dtype)?);
        let of_rows = |rows| -> Result<_> {
            Ok(Self {
                cublas: cublas.clone(),
                product: Product { rows, ..product },
                descriptor: describe(product.dtype, product.added)?,
                weight: layout(dtype, output, input)?,
                x: layout(dtype, rows, input)?,
                out: layout(out_dtype, rows, output)?,
                algorithms: Vec::with_capacity(CANDIDATES),
                chosen: 0,
                tuned: false,
            })
        };
        let mut matmul = of_rows(rows)?;
        match choice {
            Choice::Fastest => matmul.find_algorithms(REDUCTION_IN_F32, scratch)?,
            Choice::AnyRows(most) => {
                let mut usual = of_rows(USUAL_ROWS)?;
                usual.find_algorithms(NO_REDUCTION, scratch)?;
                let [one, most] = [of_rows(1)?, of_rows(most)?];
                let fits = |found: &Algorithm| {
                    [&one, &most, &matmul].iter().all(|product| product.check(found, scratch).is_some())
                };
                let found = usual.algorithms.iter().find(|found| fits(found));
                let found = found.and_then(|found| matmul.check(found, scratch));
                matmul.algorithms.push(found.ok_or_else(|| {
                    format!("cuBLASLt has no kernel for {product:?} that serves any number of rows")
                })?);
                matmul.tuned = true;
            }
        }
        Ok(matmul)
    }

    /// An algorithm as it serves this product, if it does with so much memory.
    fn check(&self, algorithm: &Algorithm, scratch: usize) -> Option<Algorithm> {
        let mut found = *algorithm;
        // SAFETY: everything that is named is alive, and the result is written.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.cublas.handle,
                self.descriptor.raw,
                self.weight.raw,
                self.x.raw,
                self.out.raw,
                self.out.raw,
                &raw const algorithm.algo,
                &raw mut found,
            )
        };
        // The result says what is needed; the algorithm is the one that was asked for.
        found.algo = algorithm.algo;
        (status.result().is_ok() && found.state.result().is_ok() && found.workspaceSize <= scratch)
            .then_some(found)
    }

    fn find_algorithms(&mut self, reduction_schemes: u32, scratch: usize) -> Result<()> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let preference =
            Described { raw: result::create_matmul_pref()?, destroy: result::destroy_matmul_pref };
        let (scratch, mut found) = (scratch as u64, 0);
        // SAFETY: everything that is named is alive; the attributes are a `u64`
        // and a `u32`; the list has room for as many results as are asked for,
        // of which the first `found` are written.
        unsafe {
            let set = |attribute, value: *const c_void, size| {
                result::set_matmul_pref_attribute(preference.raw, attribute, value, size)
            };
            let bytes = Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            set(bytes, (&raw const scratch).cast(), size_of::<u64>())?;
            let reduction = Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK;
            set(reduction, (&raw const reduction_schemes).cast(), size_of::<u32>())?;
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.cublas.handle,
                self.descriptor.raw,
                self.weight.raw,
                self.x.raw,
                self.out.raw,
                self.out.raw,
                preference.raw,
                CANDIDATES as i32,
                self.algorithms.as_mut_ptr(),
                &mut found,
            )
            .result()?;
            self.algorithms.set_len(usize::try_from(found).unwrap_or(0).min(CANDIDATES));
        }
        self.algorithms.retain(|found| found.state.result().is_ok());
        if self.algorithms.is_empty() {
            return Err(format!("cuBLASLt has no kernel for {:?}", self.product).into());
        }
        Ok(())
    }

    /// Whether an algorithm was chosen for good.
    pub fn is_tuned(&self) -> bool {
        self.tuned
    }

    /// The algorithm that is taken, as cuBLASLt has it.
    pub fn algorithm(&self) -> [u64; 8] {
        self.algorithms[self.chosen].algo.data
    }

    /// Takes an algorithm for good, if it is one of those that cuBLASLt suggests.
    pub fn choose(&mut self, algorithm: [u64; 8]) -> bool {
        let known = self.algorithms.iter().position(|found| found.algo.data == algorithm);
        if let Some(chosen) = known {
            (self.chosen, self.tuned) = (chosen, true);
        }
        known.is_some()
    }

    /// Takes the fastest algorithm for good. `work` is timed as a CUDA graph, and multiplies by as many
    /// weights as a step does. Returns the milliseconds that it takes now.
    pub fn tune(&mut self, mut work: impl FnMut(&Self) -> Result<()>) -> Result<f32> {
        let mut best = (f32::INFINITY, 0);
        for chosen in 0..self.algorithms.len() {
            self.chosen = chosen;
            // One that fails is no candidate.
            if let Ok(time) = self.time(best.0, &mut work)
                && time < best.0
            {
                best = (time, chosen);
            }
        }
        self.chosen = best.1;
        self.tuned = true;
        Ok(best.0)
    }

    /// The milliseconds that `work` takes as a CUDA graph, with nothing in the GPU's cache, as it is in a
    /// step; measured once only if that is much more than the best.
    pub fn time(&self, best: f32, work: &mut impl FnMut(&Self) -> Result<()>) -> Result<f32> {
        let cuda = &self.cublas.cuda;
        // The first call loads the kernel.
        work(self)?;
        // SAFETY: `work` borrows the memory that it uses, and the graph goes before it.
        let step = unsafe { graph::capture(&Stream::from(cuda), || work(self))? };
        let mut shortest = f32::INFINITY;
        for _ in 0..LAUNCHES {
            shortest = shortest.min(graph::cold_milliseconds(cuda, || Ok(step.launch(&())?))?);
            if shortest > HOPELESS * best {
                break;
            }
        }
        Ok(shortest)
    }

    /// What is multiplied.
    pub fn product(&self) -> &Product {
        &self.product
    }

    /// `out = factor · x · matrixᵀ`, and what is added. All are contiguous, with
    /// addresses that are multiples of 256 bytes, and may have any shape. There is a
    /// bias if the product has one, and scales if it is of `e4m3`. `scratch` is what
    /// other products on the stream use, too.
    pub fn run(
        &self,
        out: &mut TensorMut<'_>,
        x: &Factor<'_>,
        weight: &Weight<'_>,
        scratch: &mut TensorMut<'_>,
    ) -> Result<()> {
        let Product { rows, input, output, factor, added, dtype, out_dtype } = self.product;
        let algorithm = &self.algorithms[self.chosen];
        let device = Device::Cuda(self.cublas.cuda.context().ordinal() as u32);
        let check = |name, tensor: &TensorRef<'_>, dtype, numel| {
            self.product.check_tensor(name, tensor, dtype, numel, device)
        };
        if weight.bias.is_some() != (added == Added::Bias) {
            return Err(format!("the bias of {:?} is {:?}", self.product, weight.bias).into());
        }
        check("out", &out.as_ref(), out_dtype, rows * output)?;
        check("x", &x.numbers, dtype, rows * input)?;
        check("weight", &weight.matrix.numbers, dtype, input * output)?;
        if let Some(bias) = weight.bias {
            check("bias", &bias, out_dtype, output)?;
            set_pointer(&self.descriptor, BIAS, bias.data_ptr())?;
        }
        let scaled =
            [("x", x.scales, rows, X_SCALES), ("weight", weight.matrix.scales, output, WEIGHT_SCALES)];
        for (of, scales, numel, pointer) in scaled {
            if scales.is_some() != (dtype == DType::E4M3) {
                return Err(format!("the scales of {of} of {:?} are {scales:?}", self.product).into());
            }
            if let Some(scales) = scales {
                check("scales", &scales, DType::F32, numel)?;
                set_pointer(&self.descriptor, pointer, scales.data_ptr())?;
            }
        }
        if scratch.dtype() != DType::U8 || scratch.numel() < algorithm.workspaceSize {
            return Err(
                format!("the product needs {} bytes of scratch memory", algorithm.workspaceSize).into()
            );
        }
        let kept = if added == Added::Output { 1f32 } else { 0.0 };
        // SAFETY: the descriptions are alive, and the tensors are what they
        // describe, on the handle's device; `out` and `scratch` are borrowed
        // alone. The two factors are read before the function returns.
        unsafe {
            result::matmul(
                self.cublas.handle,
                self.descriptor.raw,
                (&raw const factor).cast(),
                (&raw const kept).cast(),
                weight.matrix.numbers.data_ptr(),
                self.weight.raw,
                x.numbers.data_ptr(),
                self.x.raw,
                out.data_ptr(),
                self.out.raw,
                out.data_ptr(),
                self.out.raw,
                &raw const algorithm.algo,
                scratch.data_ptr(),
                scratch.numel(),
                self.cublas.cuda.cu_stream().cast(),
            )?;
        }
        Ok(())
    }
}
