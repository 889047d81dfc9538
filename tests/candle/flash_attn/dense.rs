//! Batches of one length.

use super::*;

#[test]
fn dense_batches() {
    let mut rng = Rng::new();
    for place in places() {
        for _ in 0..place.cases {
            let mut asked = Asked::random(&mut rng, &place, place.longest);
            if !place.is_cuda() && rng.below(3) == 0 {
                asked.slopes = Some(Vec::new());
            }
            let case = dense_case(&mut rng, &place, (asked.left.is_some(), asked.softcap.is_some()));
            let [q, k, v] = &case;
            if asked.slopes.is_some() {
                asked.slopes = Some((0..q.dims()[2]).map(|_| rng.below(100) as f32 / 200.0).collect());
            }
            let what = describe(&case, &asked);
            let got = call_dense(q, k, v, &asked).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!((got.dims(), got.dtype()), (q.dims(), q.dtype()));
            assert_close(&got, &plain_dense(q, k, v, &asked), &what);
        }
    }
}

/// Long enough for FlashAttention 3, and for keys to be divided.
#[test]
fn long_sequences() {
    let mut rng = Rng::new();
    for place in places().iter().filter(|place| place.is_cuda()) {
        for (s_q, s_k, b) in
            [(128, 128, 2), (200, 700, 1), (700, 200, 2), (1, 4000, 1), (3, 3000, 2), (257, 257, 3)]
        {
            for way in 0..5 {
                for right in [None, Some(0)] {
                    for left in [None, Some(50)] {
                        let (dtype, d) = place.types(&mut rng, left.is_some(), false);
                        let shape = |s, h| [b, s, h, d];
                        let q = laid_out(&mut rng, shape(s_q, 4), dtype, &place.device, way % 2);
                        let k = laid_out(&mut rng, shape(s_k, 2), dtype, &place.device, way);
                        let v = laid_out(&mut rng, shape(s_k, 2), dtype, &place.device, way);
                        let asked = Asked { scale: 0.1, left, right, ..Asked::default() };
                        let case = [q, k, v];
                        let got = call_dense(&case[0], &case[1], &case[2], &asked).unwrap();
                        let expected = plain_dense(&case[0], &case[1], &case[2], &asked);
                        assert_close(&got, &expected, &describe(&case, &asked));
                    }
                }
            }
        }
    }
}

/// A window and a soft cap at once, as Gemma 2 has them, with its head dimension.
#[test]
fn window_and_soft_cap() {
    let mut rng = Rng::new();
    for place in places() {
        let (dtype, d) = place.types(&mut rng, true, true);
        for (s_q, s_k) in [(1, 30), (20, 30), (30, 30)] {
            let mut tensor = |s, h| laid_out(&mut rng, [2, s, h, d], dtype, &place.device, 1);
            let case = [tensor(s_q, 4), tensor(s_k, 2), tensor(s_k, 2)];
            let (left, right) = (Some(5), Some(0));
            let asked = Asked { scale: 0.2, left, right, softcap: Some(3.0), ..Asked::default() };
            let got = call_dense(&case[0], &case[1], &case[2], &asked).unwrap();
            assert_close(&got, &plain_dense(&case[0], &case[1], &case[2], &asked), &describe(&case, &asked));
        }
    }
}
