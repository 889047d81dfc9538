//! How heads are turned.

use crate::{
    error::Result,
    reference::host::{HostCheck, Rows},
    rope::{RopeFrequencies, RopeOptions, RopeScaling, RopeTensors, Rotation},
};

/// How heads are turned.
pub(super) struct Turns<'a> {
    angles: Angles<'a>,
    pub(super) rotary_dim: usize,
    interleave: bool,
}

/// Where a position's cosines and sines come from.
pub(super) enum Angles<'a> {
    Frequencies(RopeFrequencies),
    Table(Rows<'a>),
}

impl<'a> Turns<'a> {
    /// By frequencies, for the `rotary_dim` of the options or all of a head.
    pub(super) fn computed(
        check: HostCheck,
        tensors: &RopeTensors<'_>,
        options: &RopeOptions,
        scaling: &RopeScaling,
    ) -> Result<Self> {
        let q = match tensors {
            RopeTensors::InPlace { q, .. } => q.shape(),
            RopeTensors::OutOfPlace { q, .. } => q.shape(),
        };
        let head_dim = q.last().map_or(0, |&width| width as usize);
        let rotary_dim = options.rotary_dim.unwrap_or(head_dim);
        check_rotary_dim(check, "rotary_dim", rotary_dim, head_dim)?;
        let frequencies = RopeFrequencies::new(rotary_dim, options.rope_theta, scaling)?;
        Ok(Self { angles: Angles::Frequencies(frequencies), rotary_dim, interleave: options.interleave })
    }

    /// By a table, which has a row for each position.
    pub(super) fn table(check: HostCheck, rotation: &'a Rotation<'_, &[i32]>) -> Result<Self> {
        let rows = check.rows("cos_sin_cache", &rotation.cos_sin_cache, &[], &[2])?;
        let outside = |&at: &i32| usize::try_from(at).map_or(true, |at| at >= rows.count());
        if let Some(token) = rotation.pos_ids.iter().position(outside) {
            return check.fail(
                "pos_ids",
                format!("token {token} is at {}, outside 0..{}", rotation.pos_ids[token], rows.count()),
            );
        }
        let rotary_dim = rows.width();
        check_rotary_dim(check, "cos_sin_cache", rotary_dim, rotary_dim)?;
        Ok(Self { angles: Angles::Table(rows), rotary_dim, interleave: rotation.interleave })
    }

    /// Turns the first elements of a head.
    pub(super) fn turn(&self, head: &mut [f64], position: i32) {
        let cos_sin: Vec<f64> = match &self.angles {
            Angles::Frequencies(frequencies) => frequencies.cos_sin(f64::from(position)).collect(),
            Angles::Table(rows) => rows.numbers(position as usize),
        };
        let pairs = self.rotary_dim / 2;
        let (cos, sin) = cos_sin.split_at(pairs);
        for pair in 0..pairs {
            let (a, b) = if self.interleave { (2 * pair, 2 * pair + 1) } else { (pair, pair + pairs) };
            let (x, y) = (head[a], head[b]);
            head[a] = x * cos[pair] - y * sin[pair];
            head[b] = y * cos[pair] + x * sin[pair];
        }
    }
}

pub(super) fn linear(options: &RopeOptions) -> RopeScaling {
    RopeScaling::Linear { factor: options.rope_scale }
}

pub(super) fn check_rotary_dim(
    check: HostCheck,
    argument: &'static str,
    rotary_dim: usize,
    head_dim: usize,
) -> Result<()> {
    if rotary_dim > 0 && rotary_dim.is_multiple_of(2) && rotary_dim <= head_dim {
        return Ok(());
    }
    check.fail(
        argument,
        format!("{rotary_dim} of {head_dim} elements are turned; that must be even, and not 0"),
    )
}
