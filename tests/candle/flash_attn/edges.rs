//! Nothing to do, and what is refused.

use super::*;

#[test]
fn nothing_to_do() {
    for place in places() {
        let (dtype, d, device) = (DType::BF16, 64, &place.device);
        // Parts of other tensors, because CUDA allocates nothing of no bytes.
        let empty = |shape: &[usize]| {
            let all: Vec<usize> = shape.iter().map(|&size| size.max(1)).collect();
            let all = Tensor::ones(all, dtype, device).unwrap();
            let axes = shape.iter().enumerate();
            axes.fold(all, |tensor, (axis, &size)| tensor.narrow(axis, 0, size).unwrap())
        };
        for (b, s_q, s_k) in [(0, 3, 3), (2, 0, 3), (2, 3, 0)] {
            let (q, k) = (empty(&[b, s_q, 4, d]), empty(&[b, s_k, 2, d]));
            let out = flash_attn(&q, &k, &k, 0.1, true).unwrap();
            assert_eq!((out.dims(), out.dtype()), (q.dims(), dtype));
            if out.elem_count() == 0 {
                continue;
            }
            let out = out.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
            assert!(out.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|&number| number == 0.0));
        }
        let (q, k) = (empty(&[0, 4, d]), empty(&[0, 2, d]));
        for ends in [&[0u32][..], &[0, 0, 0]] {
            let ends = Tensor::new(ends, &Device::Cpu).unwrap();
            let out = flash_attn_varlen(&q, &k, &k, &ends, &ends, 0, 0, 0.1, false).unwrap();
            assert_eq!(out.dims(), q.dims());
        }
    }
}

#[track_caller]
fn refused(result: Result<Tensor>, problem: &str) {
    let error = result.expect_err(problem).to_string();
    assert!(error.contains(problem), "{error:?} does not say {problem:?}");
}

#[test]
fn wrong_input() {
    for place in places() {
        let (dtype, device) = (DType::BF16, &place.device);
        let ones = |shape: &[usize]| Tensor::ones(shape, dtype, device).unwrap();
        let (q, k) = (ones(&[2, 3, 4, 64]), ones(&[2, 5, 2, 64]));
        let call = |q: &Tensor, k: &Tensor, v: &Tensor| flash_attn(q, k, v, 0.1, true);
        refused(call(&q, &k, &ones(&[2, 6, 2, 64])), "must be alike");
        refused(call(&q, &ones(&[1, 5, 2, 64]), &ones(&[1, 5, 2, 64])), "with the batch");
        refused(call(&q, &ones(&[2, 5, 2, 32]), &ones(&[2, 5, 2, 32])), "head dimension of q");
        refused(call(&q, &ones(&[2, 5, 3, 64]), &ones(&[2, 5, 3, 64])), "4 heads of q over 3");
        let none = k.narrow(2, 0, 0).unwrap();
        refused(call(&q, &none, &none), "4 heads of q over 0");
        refused(call(&ones(&[3, 4, 64]), &k, &k), "expected 4 dimensions");
        let zeros = |tensor: &Tensor, dtype| Tensor::zeros(tensor.shape(), dtype, device).unwrap();
        refused(call(&q, &zeros(&k, DType::F16), &k), "k is f16, q is bf16");
        let odd = |width| [ones(&[1, 3, 2, width]), ones(&[1, 3, 2, width])];
        let [q_odd, k_odd] = odd(60);
        refused(call(&q_odd, &k_odd, &k_odd), "a head dimension of 60");
        let [q_odd, k_odd] = odd(520);
        refused(call(&q_odd, &k_odd, &k_odd), "a head dimension of 520");
        let keys = zeros(&k, DType::U8);
        refused(call(&zeros(&q, DType::U8), &keys, &keys), "tensors of u8");

        let (q, k) = (ones(&[6, 4, 64]), ones(&[8, 2, 64]));
        let new =
            |ends: &[u32]| Tensor::new(ends, if ends.is_empty() { &Device::Cpu } else { device }).unwrap();
        let varlen = |queries: &[u32], keys: &[u32], max: usize| {
            flash_attn_varlen(&q, &k, &k, &new(queries), &new(keys), max, max, 0.1, false)
        };
        assert!(varlen(&[0, 4, 6], &[0, 0, 8], 8).is_ok());
        refused(varlen(&[1, 4, 6], &[0, 0, 8], 8), "begins with 1");
        refused(varlen(&[0, 4, 3], &[0, 0, 8], 8), "decreases from 4 to 3");
        refused(varlen(&[0, 4, 5], &[0, 0, 8], 8), "seqlens_q ends with 5");
        refused(varlen(&[0, 4, 6], &[0, 0, 9], 9), "seqlens_k ends with 9");
        refused(varlen(&[0, 4, 6], &[0, 8], 8), "of 2 sequences, seqlens_k of 1");
        refused(varlen(&[0, 4, 6], &[0, 0, 8], 7), "sequence 1 has 8 rows");
        refused(varlen(&[], &[], 7), "expected one dimension");
        let (far, ends) = (Tensor::new(&[0, 6, i64::MIN], device).unwrap(), new(&[0, 0, 8]));
        let max = usize::MAX;
        refused(flash_attn_varlen(&q, &k, &k, &far, &ends, max, max, 0.1, false), "decreases from 6");
        let floats = Tensor::new(&[0f32, 6.0], device).unwrap();
        refused(
            flash_attn_varlen(&q, &k, &k, &floats, &floats, 8, 8, 0.1, false),
            "expected u32, i32 or i64",
        );

        let cache = ones(&[4, 16, 2, 64]);
        let paged = |table: &[[u32; 2]], page_size, ranges: Option<&Tensor>| {
            let table = Tensor::from_slice(table.as_flattened(), (table.len(), 2), device).unwrap();
            let (cum_q, cum_k) = (new(&[0, 4, 6]), new(&[0, 17, 20]));
            flash_attn_varlen_paged_windowed(
                &q,
                &cache,
                &cache,
                &cum_q,
                &cum_k,
                &table,
                ranges,
                8,
                32,
                0.1,
                None,
                Some(0),
                page_size,
                None,
            )
        };
        assert!(paged(&[[3, 1], [0, 9]], 16, None).is_ok());
        refused(paged(&[[3, 4], [0, 9]], 16, None), "4");
        refused(paged(&[[3, 1], [0, 9]], 32, None), "page_block_size is 32");
        refused(paged(&[[3, 1]], 16, None), "block_table has 1 rows");
        refused(paged(&[[3, u32::MAX], [0, 0]], 16, None), "names block 4294967295");
        let ranges = Tensor::zeros((3, 1, 2), DType::U32, device).unwrap();
        refused(paged(&[[3, 1], [0, 9]], 16, Some(&ranges)), "expected (2, max_ranges, 2)");

        let (q, k) = (ones(&[1, 3, 4, 64]), ones(&[1, 5, 2, 64]));
        for slopes in [Tensor::zeros(3, DType::F32, device), Tensor::zeros(4, DType::F16, device)] {
            refused(flash_attn_alibi(&q, &k, &k, &slopes.unwrap(), 0.1, true), "expected f32 and (4,)");
        }
    }
}

/// What there are no kernels for on CUDA is an error that names what there is.
#[test]
fn no_kernel_on_cuda() {
    for place in places().iter().filter(|place| place.is_cuda()) {
        let device = &place.device;
        let ones = |dtype, width| Tensor::ones((1, 3, 2, width), dtype, device).unwrap();
        let call = |x: &Tensor| flash_attn(x, x, x, 0.1, true);
        refused(call(&ones(DType::F32, 64)), "on CUDA there are f16 and bf16");
        refused(call(&ones(DType::F16, 96)), "head dimensions 64, 128 and 256");
        let (x, slopes) = (ones(DType::F16, 64), Tensor::ones(2, DType::F32, device).unwrap());
        refused(flash_attn_alibi(&x, &x, &x, &slopes, 0.1, true), "with ALiBi; there are none");
        refused(flash_attn_alibi(&x, &x, &x, &slopes, 0.1, false), "ALiBi needs window_size_right = Some(0)");
        refused(
            flash_attn_alibi_windowed_softcap(&x, &x, &x, Some(&slopes), 0.1, None, Some(0), 2.0),
            "soft cap",
        );
        let on_host = x.to_device(&Device::Cpu).unwrap();
        refused(flash_attn(&x, &on_host, &x, 0.1, true), "k is on Cpu");
        refused(flash_attn(&on_host, &x, &x, 0.1, true), "k is on Cuda");
        // And afterwards all is well.
        assert!(call(&x).is_ok());
    }
}

#[test]
fn there_is_no_gradient() {
    let x = Var::ones((1, 3, 2, 16), DType::F32, &Device::Cpu).unwrap();
    let out = flash_attn(&x, &x, &x, 0.1, true).unwrap();
    assert!(out.sum_all().unwrap().backward().is_err());
}
