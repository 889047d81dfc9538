//! Merging partial attention results on the CPU.

use super::host::{HostCheck, Rows};
use crate::{
    cascade::{self, State, StateMut},
    dtype::DType,
    error::Result,
    tensor::TensorRef,
};

/// Element types of outputs beside the wide ones.
const DTYPES: [DType; 2] = [DType::F16, DType::BF16];

/// [`cascade::merge_state`](crate::cascade::merge_state) on the CPU. In each
/// state `v` is `[rows, heads, head_dim]` and `s` `[rows, heads]`.
///
/// Each `v` is `f16`, `bf16`, `f32` or `f64`, each `s` `f32` or `f64`; any head
/// dimension and strides are fine. Two states without keys give one: zeros,
/// and −∞.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit. Nothing was written.
pub fn merge_state(merged: &mut StateMut<'_>, a: &State<'_>, b: &State<'_>) -> Result<()> {
    let check = HostCheck { op: "reference::merge_state" };
    check.as_kernel(|check| cascade::check_merge_state(check, merged, a, b))?;
    let mut v_merged = check.rows_mut("merged.v", &mut merged.v, &DTYPES, &[3])?;
    let mut s_merged = check.rows_mut("merged.s", &mut merged.s, &[], &[2])?;
    let v = [check.rows("a.v", &a.v, &DTYPES, &[3])?, check.rows("b.v", &b.v, &DTYPES, &[3])?];
    let s = [check.rows("a.s", &a.s, &[], &[2])?, check.rows("b.s", &b.s, &[], &[2])?];
    check_shapes(check, ["a.v", "a.s"], v[0].shape(), [&v[0], &s[0]])?;
    check_shapes(check, ["b.v", "b.s"], v[0].shape(), [&v[1], &s[1]])?;
    check_shapes(check, ["merged.v", "merged.s"], v[0].shape(), [&v_merged.rows, &s_merged.rows])?;
    for row in 0..s_merged.rows.count() {
        let heads = s_merged.rows.width();
        let sums = [s[0].numbers(row), s[1].numbers(row)];
        let mut row_sums = vec![0.0; heads];
        for (head, sum) in row_sums.iter_mut().enumerate() {
            let at = row * heads + head;
            let states = [0, 1].map(|side| (v[side].numbers(at), sums[side][head]));
            let output;
            (output, *sum) = merge(&states, v_merged.rows.width());
            v_merged.write(at, &output);
        }
        s_merged.write(row, &row_sums);
    }
    Ok(())
}

/// [`cascade::merge_state_in_place`](crate::cascade::merge_state_in_place) on
/// the CPU. `mask`, if given, is `[rows]` of `u8` or bool; tensors are
/// otherwise as in [`merge_state`].
///
/// # Errors
/// As [`merge_state`].
pub fn merge_state_in_place(
    state: &mut StateMut<'_>,
    other: &State<'_>,
    mask: Option<&TensorRef<'_>>,
) -> Result<()> {
    let check = HostCheck { op: "reference::merge_state_in_place" };
    check.as_kernel(|check| cascade::check_merge_state_in_place(check, state, other, mask))?;
    let mut v = check.rows_mut("state.v", &mut state.v, &DTYPES, &[3])?;
    let mut s = check.rows_mut("state.s", &mut state.s, &[], &[2])?;
    let v_other = check.rows("other.v", &other.v, &DTYPES, &[3])?;
    let s_other = check.rows("other.s", &other.s, &[], &[2])?;
    check_shapes(check, ["state.v", "state.s"], v.rows.shape(), [&v.rows, &s.rows])?;
    check_shapes(check, ["other.v", "other.s"], v.rows.shape(), [&v_other, &s_other])?;
    let mask = mask.map(|mask| check.flags("mask", mask)).transpose()?;
    if let Some(mask) = mask.as_ref().filter(|mask| mask.len() != s.rows.count()) {
        return check.fail("mask", format!("{} entries for {} rows", mask.len(), s.rows.count()));
    }
    for row in (0..s.rows.count()).filter(|&row| mask.as_ref().is_none_or(|mask| mask[row])) {
        let (mut sums, other_sums) = (s.rows.numbers(row), s_other.numbers(row));
        for (head, sum) in sums.iter_mut().enumerate() {
            let at = row * other_sums.len() + head;
            let states = [(v.rows.numbers(at), *sum), (v_other.numbers(at), other_sums[head])];
            let output;
            (output, *sum) = merge(&states, v.rows.width());
            v.write(at, &output);
        }
        s.write(row, &sums);
    }
    Ok(())
}

/// [`cascade::merge_states`](crate::cascade::merge_states) on the CPU:
/// `states.v` is `[rows, states, heads, head_dim]`, `states.s` `[rows, states,
/// heads]`; tensors are otherwise as in [`merge_state`]. No states give zeros,
/// and −∞.
///
/// # Errors
/// As [`merge_state`].
pub fn merge_states(merged: &mut StateMut<'_>, states: &State<'_>) -> Result<()> {
    let check = HostCheck { op: "reference::merge_states" };
    check.as_kernel(|check| cascade::check_merge_states(check, merged, states))?;
    let mut v_merged = check.rows_mut("merged.v", &mut merged.v, &DTYPES, &[3])?;
    let mut s_merged = check.rows_mut("merged.s", &mut merged.s, &[], &[2])?;
    let v = check.rows("states.v", &states.v, &DTYPES, &[4])?;
    let s = check.rows("states.s", &states.s, &[], &[3])?;
    let &[rows, heads, head_dim] = v_merged.rows.shape() else { unreachable!("three dimensions") };
    let count = v.shape()[1];
    check_shapes(
        check,
        ["merged.v", "merged.s"],
        &[rows, heads, head_dim],
        [&v_merged.rows, &s_merged.rows],
    )?;
    check_shapes(check, ["states.v", "states.s"], &[rows, count, heads, head_dim], [&v, &s])?;
    let (count, heads) = (count as usize, heads as usize);
    for row in 0..s_merged.rows.count() {
        let sums: Vec<_> = (0..count).map(|state| s.numbers(row * count + state)).collect();
        let mut row_sums = vec![0.0; heads];
        for (head, sum) in row_sums.iter_mut().enumerate() {
            let states: Vec<_> = (0..count)
                .map(|state| (v.numbers((row * count + state) * heads + head), sums[state][head]))
                .collect();
            let output;
            (output, *sum) = merge(&states, v_merged.rows.width());
            v_merged.write(row * heads + head, &output);
        }
        s_merged.write(row, &row_sums);
    }
    Ok(())
}

/// `v` has this shape, and `s` the same without the last dimension.
fn check_shapes(
    check: HostCheck,
    names: [&'static str; 2],
    shape: &[i64],
    [v, s]: [&Rows<'_>; 2],
) -> Result<()> {
    check.shape(names[0], v, shape)?;
    check.shape(names[1], s, &shape[..shape.len() - 1])
}

/// The state of all keys of these states. One without keys weighs nothing,
/// whatever its output.
fn merge(states: &[(Vec<f64>, f64)], width: usize) -> (Vec<f64>, f64) {
    let mut output = vec![0.0; width];
    let max = states.iter().map(|state| state.1).fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return (output, max);
    }
    let total: f64 = states.iter().map(|state| (state.1 - max).exp2()).sum();
    for (v, s) in states.iter().filter(|state| state.1 != f64::NEG_INFINITY) {
        let weight = (s - max).exp2() / total;
        output.iter_mut().zip(v).for_each(|(o, v)| *o += weight * v);
    }
    (output, max + total.log2())
}

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        PageIndices,
        attention::{AttentionSpec, RunOptions},
        kv::{KvLayout, PagedKv},
        reference::batch_decode,
        reference::testing::{refused, view, view_mut},
    };

    /// One row of some heads of width 2, with logarithms.
    #[derive(Clone, Debug, PartialEq)]
    struct Row {
        v: Vec<f64>,
        s: Vec<f64>,
    }

    impl Row {
        fn none(heads: usize) -> Self {
            Self { v: vec![0.0; 2 * heads], s: vec![f64::NEG_INFINITY; heads] }
        }

        fn view(&self) -> State<'_> {
            let heads = self.s.len();
            State::new(view(&self.v, &[1, heads, 2]), view(&self.s, &[1, heads]))
        }

        fn view_mut(&mut self) -> StateMut<'_> {
            let heads = self.s.len();
            StateMut::new(view_mut(&mut self.v, &[1, heads, 2]), view_mut(&mut self.s, &[1, heads]))
        }

        fn with(&self, other: &Self) -> Self {
            let mut merged = Self { v: vec![f64::NAN; self.v.len()], s: vec![f64::NAN; self.s.len()] };
            merge_state(&mut merged.view_mut(), &self.view(), &other.view()).unwrap();
            let mut in_place = self.clone();
            merge_state_in_place(&mut in_place.view_mut(), &other.view(), None).unwrap();
            assert_eq!(in_place, merged);
            merged
        }
    }

    fn all(rows: &[Row]) -> Row {
        let heads = rows[0].s.len();
        let v: Vec<f64> = rows.iter().flat_map(|row| row.v.clone()).collect();
        let s: Vec<f64> = rows.iter().flat_map(|row| row.s.clone()).collect();
        let states = State::new(view(&v, &[1, rows.len(), heads, 2]), view(&s, &[1, rows.len(), heads]));
        let mut merged = Row { v: vec![f64::NAN; 2 * heads], s: vec![f64::NAN; heads] };
        merge_states(&mut merged.view_mut(), &states).unwrap();
        merged
    }

    #[track_caller]
    fn close(a: &Row, b: &Row) {
        let near = |(a, b): (&f64, &f64)| a == b || (a - b).abs() < 1e-9;
        assert!(a.v.iter().zip(&b.v).all(near) && a.s.iter().zip(&b.s).all(near), "{a:?} is not {b:?}");
    }

    #[test]
    fn by_hand() {
        // Sums 2 and 6: weights 1/4 and 3/4 of a sum of 8.
        let a = Row { v: vec![4.0, 8.0], s: vec![1.0] };
        let b = Row { v: vec![8.0, 0.0], s: vec![6f64.log2()] };
        close(&a.with(&b), &Row { v: vec![7.0, 2.0], s: vec![3.0] });
        assert_eq!(a.with(&Row::none(1)), a);
        assert_eq!(Row::none(1).with(&a), a);
        assert_eq!(Row::none(1).with(&Row::none(1)), Row::none(1));
        // What a state without keys holds does not matter.
        let dirt = Row { v: vec![f64::NAN, f64::INFINITY], s: vec![f64::NEG_INFINITY] };
        assert_eq!(a.with(&dirt), a);
    }

    #[test]
    fn masks_choose_rows() {
        let (mut v, mut s) = ([2.0f32, 4.0, 6.0], [1.0f32; 3]);
        let (v_other, s_other, mask) = ([4.0f32, 6.0, 8.0], [1.0f32; 3], [1u8, 0, 255]);
        let mut state = StateMut::new(view_mut(&mut v, &[3, 1, 1]), view_mut(&mut s, &[3, 1]));
        let other = State::new(view(&v_other, &[3, 1, 1]), view(&s_other, &[3, 1]));
        merge_state_in_place(&mut state, &other, Some(&view(&mask, &[3]))).unwrap();
        assert_eq!((v, s), ([3.0, 4.0, 7.0], [2.0, 1.0, 2.0]));
    }

    #[test]
    fn wrong_input_is_refused_and_nothing_written() {
        let (numbers, halves, bytes) = ([1.0f32; 24], [f16::ONE; 24], [1u8; 4]);
        let (mut v, mut s) = ([7.0f32; 12], [7.0f32; 6]);
        let n = |shape: &[usize]| view(&numbers, shape);
        let good = State::new(n(&[3, 2, 2]), n(&[3, 2]));
        let mut merge = |a: &State<'_>, b: &State<'_>, shape: [&[usize]; 2]| {
            let mut merged = StateMut::new(view_mut(&mut v, shape[0]), view_mut(&mut s, shape[1]));
            merge_state(&mut merged, a, b)
        };
        let shape: [&[usize]; 2] = [&[3, 2, 2], &[3, 2]];
        refused(merge(&State::new(n(&[6, 2]), n(&[6])), &good, shape), "a.v");
        refused(merge(&State::new(n(&[3, 2, 2]), n(&[2, 3])), &good, shape), "a.s");
        refused(merge(&State::new(n(&[3, 2, 2]), view(&halves, &[3, 2])), &good, shape), "a.s");
        refused(merge(&good, &State::new(n(&[2, 3, 2]), n(&[2, 3])), shape), "b.v");
        refused(merge(&good, &State::new(n(&[3, 2, 2]), n(&[2, 2])), shape), "b.s");
        refused(merge(&good, &good, [&[2, 3, 2], &[2, 3]]), "merged.v");
        refused(merge(&good, &good, [&[3, 2, 2], &[2, 3]]), "merged.s");
        let mut in_place = |mask: &TensorRef<'_>| {
            let mut state = StateMut::new(view_mut(&mut v, shape[0]), view_mut(&mut s, shape[1]));
            merge_state_in_place(&mut state, &good, Some(mask))
        };
        refused(in_place(&view(&bytes, &[4])), "mask");
        refused(in_place(&view(&bytes, &[3, 1])), "mask");
        refused(in_place(&n(&[3])), "mask");
        let mut merge_all = |states: &State<'_>| {
            let mut merged = StateMut::new(view_mut(&mut v, shape[0]), view_mut(&mut s, shape[1]));
            merge_states(&mut merged, states)
        };
        refused(merge_all(&good), "states.v");
        refused(merge_all(&State::new(n(&[2, 2, 2, 2]), n(&[2, 2, 2]))), "states.v");
        refused(merge_all(&State::new(n(&[3, 2, 2, 2]), n(&[3, 1, 2]))), "states.s");
        assert_eq!((v, s), ([7.0; 12], [7.0; 6]));
    }

    #[test]
    fn no_states_are_a_state_without_keys() {
        let (mut v, mut s, nothing) = ([7.0f32; 12], [7.0f32; 6], [0.0f32; 0]);
        let mut merged = StateMut::new(view_mut(&mut v, &[3, 2, 2]), view_mut(&mut s, &[3, 2]));
        let states = State::new(view(&nothing, &[3, 0, 2, 2]), view(&nothing, &[3, 0, 2]));
        merge_states(&mut merged, &states).unwrap();
        assert_eq!((v, s), ([0.0; 12], [f32::NEG_INFINITY; 6]));
    }

    fn rows(heads: usize) -> impl Strategy<Value = Row> {
        let sum = prop_oneof![5 => -40.0f64..40.0, 1 => Just(f64::NEG_INFINITY)];
        (prop::collection::vec(-3.0f64..3.0, 2 * heads), prop::collection::vec(sum, heads)).prop_map(
            |(mut v, s)| {
                let empty = |head: usize| s[head] == f64::NEG_INFINITY;
                v.iter_mut().enumerate().filter(|(at, _)| empty(at / 2)).for_each(|(_, v)| *v = 0.0);
                Row { v, s }
            },
        )
    }

    proptest! {
        #[test]
        fn order_does_not_matter((a, b, c) in (1usize..4).prop_flat_map(|heads| (rows(heads), rows(heads), rows(heads)))) {
            close(&a.with(&b), &b.with(&a));
            close(&a.with(&b).with(&c), &a.with(&b.with(&c)));
            close(&all(&[a.clone(), b.clone(), c.clone()]), &c.with(&a).with(&b));
            close(&all(&[a.clone(), b.clone()]), &a.with(&b));
            close(&all(std::slice::from_ref(&a)), &a);
        }

        #[test]
        fn no_keys_change_nothing(a in rows(3)) {
            close(&a.with(&Row::none(3)), &a);
            close(&Row::none(3).with(&a), &a);
            close(&all(&[Row::none(3), a.clone(), Row::none(3)]), &a);
        }

        /// Attention to a request's first pages, merged with attention to the
        /// rest, is attention to all of them.
        #[test]
        fn merging_is_attention_to_both(
            page_size in 1usize..4,
            len in 1usize..20,
            cut in 0usize..8,
            heads in 1usize..4,
            seed: u64,
        ) {
            let pages: Vec<i32> = (0..len.div_ceil(page_size) as i32).collect();
            let cut = cut.min(pages.len() - 1);
            let mut state = seed;
            let mut numbers = |len: usize| -> Vec<f64> {
                (0..len).map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (state >> 11) as f64 / (1u64 << 51) as f64 - 2.0
                }).collect()
            };
            let size = pages.len() * page_size * 2;
            let (q, k, v) = (numbers(heads * 2), numbers(size), numbers(size));
            let decode = |pages: &[i32], len: usize| {
                let mut row = Row { v: vec![f64::NAN; 2 * heads], s: vec![f64::NAN; heads] };
                let shape = [size / 2 / page_size, page_size, 1, 2];
                let table = PageIndices::from_requests(shape[0], page_size, [(pages, len)]).unwrap();
                let mut out = row.view_mut();
                batch_decode(
                    &AttentionSpec::new(DType::F64, 2),
                    &view(&q, &[1, heads, 2]),
                    &PagedKv::new(view(&k, &shape), view(&v, &shape), KvLayout::Nhd),
                    &table,
                    &mut out.v,
                    Some(&mut out.s),
                    &RunOptions::default(),
                ).unwrap();
                row
            };
            let (first, rest) = pages.split_at(cut);
            let tokens = cut * page_size;
            close(&decode(first, tokens).with(&decode(rest, len - tokens)), &decode(&pages, len));
        }
    }
}
