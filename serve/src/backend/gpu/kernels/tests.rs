use flashinfer_rs::{Stream, gpu::Tensor, sampling::argmax};
use test_support::Rng;

use super::*;
use crate::{backend::gpu::start, model::synthetic::Shape, tests::gpu::turn};

/// What ranks choose out of their parts of rows is what one chooses out of all: the first of equal numbers, and
/// none where one is NaN.
#[test]
fn ranks_choose_as_one() {
    const RANKS: usize = 3;
    const ROWS: usize = 300;
    const PART: usize = 7;
    let Some(_turn) = turn() else { return };
    let cuda = start(&Shape::Llama8b.config().unwrap(), 0).unwrap();
    let (stream, kernels) = (Stream::from(&cuda), Kernels::new(&cuda, DType::F16).unwrap());
    let mut rng = Rng::new();
    let numbers = [0.0, -0.0, 1.0, -1.0, 2.0, 2.0, f32::INFINITY, f32::NEG_INFINITY];
    let rows = (0..ROWS).map(|row| match row % 4 {
        0 => vec![f32::NEG_INFINITY; RANKS * PART],
        of => {
            let mut row: Vec<_> =
                (0..RANKS * PART).map(|_| numbers[rng.below(if of == 1 { 4 } else { 8 })]).collect();
            if of == 3 {
                row[rng.below(RANKS * PART)] = f32::NAN;
            }
            row
        }
    });
    let rows: Vec<Vec<f32>> = rows.collect();
    let poisoned = || Tensor::from_slice(&stream, &[ROWS], &[-7; ROWS]).unwrap();
    let whole = Tensor::from_slice(&stream, &[ROWS, RANKS * PART], &rows.concat()).unwrap();
    let mut expected = poisoned();
    argmax(&stream, &mut expected.view_mut(), &whole.view()).unwrap();

    let mut all = Tensor::<f32>::zeros(&stream, &[RANKS * ROWS, 2]).unwrap();
    for rank in 0..RANKS {
        let part: Vec<_> = rows.iter().flat_map(|row| row[rank * PART..][..PART].to_vec()).collect();
        let part = Tensor::from_slice(&stream, &[ROWS, PART], &part).unwrap();
        let mut places = poisoned();
        argmax(&stream, &mut places.view_mut(), &part.view()).unwrap();
        let mut told = all.view_mut().narrow(0, rank * ROWS, ROWS).unwrap();
        kernels.tell_largest(&mut told, &part.view(), &places.view(), rank * PART).unwrap();
    }
    let mut tokens = poisoned();
    kernels.choose_largest(&mut tokens.view_mut(), &all.view(), RANKS).unwrap();
    let (tokens, expected) = (tokens.to_vec().unwrap(), expected.to_vec().unwrap());
    assert_eq!(tokens, expected);
    assert!(expected.iter().skip(3).step_by(4).all(|&token| token == -1));
    let few = Tensor::<f32>::zeros(&stream, &[2, 2]).unwrap();
    assert!(kernels.choose_largest(&mut poisoned().view_mut(), &few.view(), RANKS).is_err());
}
