//! Paged caches that exist on the host and on the device.

use flashinfer_rs::{
    PageIndices,
    kv::{KvLayout, PagedKv, PagedKvMut},
};

use super::{Gpu, Mirrored, Number, Rng};

pub const LAYOUTS: [KvLayout; 2] = [KvLayout::Nhd, KvLayout::Hnd];

/// The sizes of a cache, and how it is stored.
#[derive(Clone, Copy, Debug)]
pub struct CacheShape {
    pub pages: usize,
    pub page_size: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub layout: KvLayout,
    /// Keys and values in one tensor `[pages, 2, …]`.
    pub joined: bool,
}

impl CacheShape {
    /// The shape of one page.
    fn page(&self) -> [usize; 3] {
        match self.layout {
            KvLayout::Nhd => [self.page_size, self.heads, self.head_dim],
            KvLayout::Hnd => [self.heads, self.page_size, self.head_dim],
        }
    }

    /// The shape of a stored tensor.
    fn tensor(&self) -> Vec<usize> {
        let pair: &[usize] = if self.joined { &[2] } else { &[] };
        [&[self.pages], pair, &self.page()].concat()
    }

    /// Where a token's head starts: in which tensor, and there at which element.
    fn place(&self, page: usize, slot: usize, head: usize, value: bool) -> (usize, usize) {
        let rows = match self.layout {
            KvLayout::Nhd => slot * self.heads + head,
            KvLayout::Hnd => head * self.page_size + slot,
        };
        let per_page = self.page_size * self.heads;
        let (tensor, page) =
            if self.joined { (0, 2 * page + usize::from(value)) } else { (usize::from(value), page) };
        (tensor, (page * per_page + rows) * self.head_dim)
    }
}

/// A cache: one joined tensor, or one for keys and one for values.
pub struct Cache<T> {
    pub tensors: Vec<Mirrored<T>>,
    pub shape: CacheShape,
}

impl<T: Number> Cache<T> {
    /// Nothing but NaN.
    pub fn poisoned(gpu: &Gpu, shape: CacheShape) -> Self {
        let tensors = if shape.joined { 1 } else { 2 };
        Self { tensors: (0..tensors).map(|_| Mirrored::poisoned(gpu, &shape.tensor())).collect(), shape }
    }

    /// Random numbers where the table's tokens are, NaN elsewhere.
    pub fn random(gpu: &Gpu, rng: &mut Rng, shape: CacheShape, table: &PageIndices) -> Self {
        let tensors = if shape.joined { 1 } else { 2 };
        let elements = shape.tensor().iter().product();
        let mut hosts = vec![vec![T::POISON; elements]; tensors];
        for request in 0..table.batch_size() {
            for position in 0..table.seq_len(request) {
                let page = table.pages(request)[position / shape.page_size] as usize;
                for (head, value) in (0..shape.heads).flat_map(|head| [(head, false), (head, true)]) {
                    let (tensor, start) = shape.place(page, position % shape.page_size, head, value);
                    let row = &mut hosts[tensor][start..start + shape.head_dim];
                    if row[0].bits() == T::POISON.bits() {
                        row.fill_with(|| T::from_f64(rng.unit()));
                    }
                }
            }
        }
        let tensors = hosts.into_iter().map(|host| Mirrored::new(gpu, &shape.tensor(), host)).collect();
        Self { tensors, shape }
    }

    /// The host copy, for the reference.
    pub fn view(&self) -> PagedKv<'_> {
        match &self.tensors[..] {
            [kv] => PagedKv::joined(kv.view(), self.shape.layout).unwrap(),
            [k, v] => PagedKv::new(k.view(), v.view(), self.shape.layout),
            _ => unreachable!("a cache has one tensor or two"),
        }
    }

    /// Copies of the host's content, for the reference to write to.
    pub fn hosts(&self) -> Vec<Vec<T>> {
        self.tensors.iter().map(|tensor| tensor.host.clone()).collect()
    }

    /// Such copies, seen as this cache.
    pub fn view_of<'a>(&self, hosts: &'a mut [Vec<T>]) -> PagedKvMut<'a> {
        match (hosts, &self.tensors[..]) {
            ([host], [kv]) => PagedKvMut::joined(kv.view_of(host), self.shape.layout).unwrap(),
            ([k_host, v_host], [k, v]) => {
                PagedKvMut::new(k.view_of(k_host), v.view_of(v_host), self.shape.layout)
            }
            _ => unreachable!("a cache has one tensor or two"),
        }
    }

    /// The device copy, for operations.
    pub fn device_view(&self) -> PagedKv<'_> {
        match &self.tensors[..] {
            [kv] => PagedKv::joined(kv.device_view(), self.shape.layout).unwrap(),
            [k, v] => PagedKv::new(k.device_view(), v.device_view(), self.shape.layout),
            _ => unreachable!("a cache has one tensor or two"),
        }
    }

    /// The device copy, for operations that write.
    pub fn device_view_mut(&mut self) -> PagedKvMut<'_> {
        match &mut self.tensors[..] {
            [kv] => PagedKvMut::joined(kv.device_view_mut(), self.shape.layout).unwrap(),
            [k, v] => PagedKvMut::new(k.device_view_mut(), v.device_view_mut(), self.shape.layout),
            _ => unreachable!("a cache has one tensor or two"),
        }
    }

    /// The same on another stream, or another device.
    pub fn copied_to(&self, gpu: &Gpu) -> Self {
        let tensors = self.tensors.iter().map(|tensor| tensor.copied_to(gpu)).collect();
        Self { tensors, shape: self.shape }
    }

    #[track_caller]
    pub fn assert_untouched(&self) {
        self.tensors.iter().for_each(|tensor| tensor.assert_untouched());
    }
}

/// A table of requests of these lengths, whose pages lie in random order among
/// some that nobody uses.
pub fn random_table(rng: &mut Rng, page_size: usize, lens: &[usize]) -> PageIndices {
    let used: usize = lens.iter().map(|len| len.div_ceil(page_size)).sum();
    table_among(rng, used + 3, page_size, lens)
}

/// A table of requests of these lengths in a cache of `num_pages` pages.
pub fn table_among(rng: &mut Rng, num_pages: usize, page_size: usize, lens: &[usize]) -> PageIndices {
    let pages = rng.permutation(num_pages);
    let mut rest = &pages[..];
    let requests = lens.iter().map(|&len| {
        let (own, others) = rest.split_at(len.div_ceil(page_size));
        rest = others;
        (own, len)
    });
    PageIndices::from_requests(num_pages, page_size, requests).unwrap()
}

/// A table of requests of these lengths that name the pages of a small cache
/// again and again, so that long requests need little memory.
pub fn repeating_table(rng: &mut Rng, num_pages: usize, page_size: usize, lens: &[usize]) -> PageIndices {
    let pages: Vec<Vec<i32>> = lens
        .iter()
        .map(|len| (0..len.div_ceil(page_size)).map(|_| rng.below(num_pages) as i32).collect())
        .collect();
    let requests = pages.iter().map(Vec::as_slice).zip(lens.iter().copied());
    PageIndices::from_requests(num_pages, page_size, requests).unwrap()
}
