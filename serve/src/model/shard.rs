//! The part of a model that one rank of several has, as in Megatron-LM: heads and the width of MLPs
//! are divided, and so is the vocabulary.
//!
//! A rank computes with its heads and its part of each MLP what it adds to the residual; the sums of
//! all ranks' are what one would have made alone. Of embeddings and logits it has those of its tokens.
//! Parts need not be equally large.

use std::ops::Range;

use super::Config;
use crate::Result;

/// Which of how many ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rank {
    /// Its number, from 0 on.
    pub rank: usize,
    /// How many there are: the world's size.
    pub size: usize,
}

impl Rank {
    /// The only one.
    pub const ALONE: Self = Self { rank: 0, size: 1 };

    /// Its part of so many things, as equal as can be.
    fn part(self, count: usize) -> Range<usize> {
        self.rank * count / self.size..(self.rank + 1) * count / self.size
    }
}

/// The tokens that a rank has rows for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VocabPart {
    /// Which.
    pub tokens: Range<usize>,
    /// As many as each rank has room for; the last may have fewer.
    pub rows: usize,
}

impl VocabPart {
    /// All.
    pub fn whole(vocab_size: usize) -> Self {
        Self { tokens: 0..vocab_size, rows: vocab_size }
    }

    fn of(vocab_size: usize, rank: Rank) -> Result<Self> {
        let least = vocab_size.div_ceil(rank.size);
        let leaves_some = |rows: &usize| (rank.size - 1) * rows < vocab_size;
        let rows = [least.next_multiple_of(VOCAB_MULTIPLE), least].into_iter().find(leaves_some);
        let rows = rows.ok_or_else(|| too_many(rank, "tokens", vocab_size))?;
        let start = rank.rank * rows;
        Ok(Self { tokens: start..(start + rows).min(vocab_size), rows })
    }
}

/// The part of a rank. Ranges of heads are those of rows of the matrices that make them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Rows of queries.
    pub queries: Range<usize>,
    /// Rows of keys, and of values. Ranks beyond the number of these heads share them.
    pub keys: Range<usize>,
    /// The width of an MLP, or of each expert.
    pub inner: Range<usize>,
    /// That of an expert that every token has.
    pub shared: Option<Range<usize>>,
    /// Tokens.
    pub vocab: VocabPart,
    /// Whether this rank adds the biases of what is summed over ranks.
    pub adds_biases: bool,
}

/// The largest blocks of quantized rows, and of what kernels read at once.
const LARGEST_BLOCK: usize = 256;
/// The multiple of tokens that a rank has, where the vocabulary allows it.
const VOCAB_MULTIPLE: usize = 8;

impl Shard {
    /// The whole model.
    pub fn whole(config: &Config) -> Self {
        let [queries, keys] = config.widths();
        Self {
            queries: 0..queries,
            keys: 0..keys,
            inner: 0..config.intermediate_size,
            shared: config.experts.and_then(|experts| experts.shared).map(|width| 0..width),
            vocab: VocabPart::whole(config.vocab_size),
            adds_biases: true,
        }
    }

    /// The part of a rank.
    ///
    /// # Errors
    /// There are more ranks than something can be divided among.
    pub fn of(config: &Config, rank: Rank) -> Result<Self> {
        if rank.size <= 1 {
            return Ok(Self::whole(config));
        }
        let [queries, keys] = heads(config, rank)?;
        let [queries, keys] =
            [queries, keys].map(|heads| heads.start * config.head_dim..heads.end * config.head_dim);
        let shared = config.experts.and_then(|experts| experts.shared);
        Ok(Self {
            queries,
            keys,
            inner: width(config.intermediate_size, rank)?,
            shared: shared.map(|shared| width(shared, rank)).transpose()?,
            vocab: VocabPart::of(config.vocab_size, rank)?,
            adds_biases: rank.rank == 0,
        })
    }

    /// What the rank's network computes. The vocabulary stays that of the model.
    pub fn config(&self, config: &Config) -> Config {
        let mut part = config.clone();
        part.heads.num_qo_heads = self.queries.len() / config.head_dim;
        part.heads.num_kv_heads = self.keys.len() / config.head_dim;
        part.intermediate_size = self.inner.len();
        if let Some(experts) = &mut part.experts {
            experts.shared = self.shared.as_ref().map(ExactSizeIterator::len);
        }
        part.biases.attention_output &= self.adds_biases;
        part.biases.down &= self.adds_biases;
        part
    }
}

fn too_many(rank: Rank, what: &str, count: usize) -> crate::Error {
    format!(
        "the model's {count} {what} cannot be divided among {} ranks; expected fewer of them (--tensor-parallel, \
         or the number of processes that are started)",
        rank.size
    )
    .into()
}

/// Heads of queries, and of keys: whole groups that share keys; if there are fewer than ranks, parts of a
/// group.
fn heads(config: &Config, rank: Rank) -> Result<[Range<usize>; 2]> {
    let (qo, kv) = (config.heads.num_qo_heads, config.heads.num_kv_heads);
    let group = qo / kv;
    if rank.size <= kv {
        let keys = rank.part(kv);
        return Ok([keys.start * group..keys.end * group, keys]);
    }
    let key = rank.rank * kv / rank.size;
    let first = |key: usize| (key * rank.size).div_ceil(kv);
    let of_key = Rank { rank: rank.rank - first(key), size: first(key + 1) - first(key) };
    let queries = of_key.part(group);
    if queries.is_empty() || of_key.size > group {
        return Err(too_many(rank, "heads", qo));
    }
    Ok([key * group + queries.start..key * group + queries.end, key..key + 1])
}

/// A part of a width, of whole blocks: the largest with which all ranks have equally many, or else of
/// which each rank has one.
fn width(width: usize, rank: Rank) -> Result<Range<usize>> {
    let blocks = || {
        let all = std::iter::successors(Some(LARGEST_BLOCK), |&block| (block > 1).then_some(block / 2));
        all.filter(|block| width.is_multiple_of(*block))
    };
    let equal = blocks().find(|block| (width / block).is_multiple_of(rank.size));
    let block = equal.or_else(|| blocks().find(|block| width / block >= rank.size));
    let block = block.ok_or_else(|| too_many(rank, "columns of MLPs", width))?;
    let blocks = rank.part(width / block);
    Ok(blocks.start * block..blocks.end * block)
}

#[cfg(test)]
mod tests {
    use flashinfer_rs::attention::Heads;

    use super::*;
    use crate::model::synthetic::Shape;

    fn config(heads: Heads, intermediate_size: usize, vocab_size: usize) -> Config {
        Config { heads, intermediate_size, vocab_size, ..Shape::Llama8b.config().unwrap() }
    }

    fn shards(config: &Config, size: usize) -> Result<Vec<Shard>> {
        (0..size).map(|rank| Shard::of(config, Rank { rank, size })).collect()
    }

    /// The parts of ranks are what one after the other makes the whole.
    fn check_whole(parts: impl Iterator<Item = Range<usize>>, whole: usize) {
        let end = parts.fold(0, |end, part| {
            assert!(part.start == end && !part.is_empty(), "{part:?} after {end}");
            part.end
        });
        assert_eq!(end, whole);
    }

    #[test]
    fn every_head_column_and_token_is_of_one_rank() {
        let models = [
            config(Heads::new(9, 3), 1536, 49_152),
            config(Heads::new(32, 8), 14_336, 128_256),
            config(Heads::new(64, 8), 28_672, 128_256),
            config(Heads::new(14, 2), 4864, 151_936),
            config(Heads::new(6, 6), 192, 300),
            config(Heads::new(8, 1), 352, 257),
        ];
        for config in &models {
            let most = config.heads.num_qo_heads.min(8);
            for size in 1..=most {
                let Ok(shards) = shards(config, size) else {
                    panic!("{:?} and {size} ranks", config.heads);
                };
                let dim = config.head_dim;
                check_whole(shards.iter().map(|shard| shard.queries.clone()), config.widths()[0]);
                check_whole(shards.iter().map(|shard| shard.inner.clone()), config.intermediate_size);
                check_whole(shards.iter().map(|shard| shard.vocab.tokens.clone()), config.vocab_size);
                assert_eq!(shards.iter().filter(|shard| shard.adds_biases).count(), 1);
                let group = config.heads.num_qo_heads / config.heads.num_kv_heads;
                for shard in &shards {
                    // Each head of queries finds its keys on its rank.
                    let [queries, keys] =
                        [&shard.queries, &shard.keys].map(|rows| rows.start / dim..rows.end / dim);
                    let wanted: Vec<_> = queries.clone().map(|head| head / group).collect();
                    assert!(wanted.iter().all(|key| keys.contains(key)));
                    let part = shard.config(config).heads;
                    let per_key = part.num_qo_heads / part.num_kv_heads;
                    assert_eq!(part.num_qo_heads, per_key * part.num_kv_heads);
                    let found = (0..queries.len()).map(|head| keys.start + head / per_key);
                    assert!(found.eq(wanted));
                }
            }
        }
    }

    #[test]
    fn parts_are_equal_where_they_can_be_and_whole_blocks() {
        let config = config(Heads::new(9, 3), 1536, 49_152);
        let parts: Vec<_> = shards(&config, 4).unwrap().into_iter().map(|shard| shard.inner).collect();
        assert_eq!(parts, [0..384, 384..768, 768..1152, 1152..1536]);
        let parts: Vec<_> = shards(&config, 2).unwrap().into_iter().map(|shard| shard.queries).collect();
        // Of three groups the first has one, and the second two.
        assert_eq!(parts, [0..3 * 128, 3 * 128..9 * 128]);
    }

    #[test]
    fn more_ranks_than_there_are_heads_are_refused() {
        let config = config(Heads::new(9, 3), 1536, 49_152);
        let problem = shards(&config, 10).unwrap_err().to_string();
        assert!(problem.contains("9 heads cannot be divided among 10 ranks"), "{problem}");
        let narrow = Config { intermediate_size: 3, ..config.clone() };
        let problem = shards(&narrow, 4).unwrap_err().to_string();
        assert!(problem.contains("3 columns"), "{problem}");
        let few = Config { vocab_size: 5, ..config };
        assert!(shards(&few, 4).unwrap_err().to_string().contains("5 tokens"));
    }
}
