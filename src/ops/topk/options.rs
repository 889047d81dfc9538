//! How the largest are selected.

/// Which of equal scores are selected, where not all of them are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TieBreak {
    /// Any of them.
    #[default]
    None,
    /// Those of smaller indices.
    Small,
    /// Those of larger indices.
    Large,
}

/// Options of selection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopKOptions {
    /// Values come in descending order, for `k` up to 2048; the transforms do
    /// not have this. Equal values come in the order that they would have had
    /// unsorted. By default the order is not specified.
    pub sorted: bool,
    /// The same input gives the same output in the same order, on one GPU.
    pub deterministic: bool,
    /// Which of equal scores are selected. But for [`TieBreak::None`] the
    /// output is deterministic and, where it is not sorted, in the order of
    /// indices; `k` is at most 2048.
    pub tie_break: TieBreak,
    /// Always launches the same kernel, *filtered*, which reads scores one by
    /// one, so that a captured graph serves other rows as well; `k` is at most
    /// 2048.
    pub dsa_graph_safe: bool,
}

impl TopKOptions {
    /// Whether upstream's rule of which kernel to launch does not matter.
    pub(super) fn asks_for_filtered(&self) -> bool {
        self.tie_break != TieBreak::None || self.dsa_graph_safe
    }
}
