"""Graphs: torch_geometric's models, and convolutions written with index_add, scatter and dense adjacencies."""

import torch
import torch.nn.functional as F
from torch import nn

from . import integers, model, normal

NODES, EDGES, GRAPHS = 12, 30, 3


def graph(features=5, seed=0):
    """x, edge_index, batch of three graphs of four nodes."""
    inside = integers(4, 2, EDGES, seed=seed)
    which = integers(GRAPHS, EDGES, seed=seed + 1)
    return normal(NODES, features, seed=seed), inside + 4 * which, torch.arange(GRAPHS).repeat_interleave(4)


class Pooled(nn.Module):
    """A network over nodes, then the sum over each graph, as torch_geometric's examples have it."""

    def __init__(self, gnn, hidden, outputs, size=None):
        super().__init__()
        from torch_geometric.nn import MLP

        self.gnn, self.size = gnn, size
        self.mlp = MLP([hidden, hidden, outputs], norm="batch_norm", dropout=0.0)

    def forward(self, x, edge_index, batch):
        from torch_geometric.nn import global_add_pool

        x = self.gnn(x, edge_index)
        x = global_add_pool(x, batch, size=self.size)
        return self.mlp(x)


def geometric(name, size=GRAPHS, **keywords):
    import torch_geometric.nn as gnn

    net = getattr(gnn.models, name)(5, 8, 2, 8, norm="batch_norm", **keywords)
    return Pooled(net, 8, 2, size), graph()


@model("graphs", source="torch_geometric, nn/models/basic_gnn.py, GIN; examples/mutag_gin.py")
def gin():
    return geometric("GIN")


@model("graphs", source="torch_geometric, nn/models/basic_gnn.py, GIN; how many graphs there are read from batch.max()")
def gin_size_of_data():
    return geometric("GIN", size=None)


@model("graphs", source="torch_geometric, nn/models/basic_gnn.py, GCN: adds self-loops, normalises by degrees")
def gcn():
    return geometric("GCN")


@model("graphs", source="torch_geometric, nn/models/basic_gnn.py, GraphSAGE with a maximum, jumping knowledge")
def graph_sage():
    return geometric("GraphSAGE", aggr="max", jk="cat")


@model("graphs", source="torch_geometric, nn/models/basic_gnn.py, GAT")
def gat():
    return geometric("GAT", heads=2, v2=True)


@model("graphs", source="torch_geometric, nn/models/basic_gnn.py, PNA")
def pna():
    return geometric(
        "PNA",
        aggregators=["mean", "min", "max", "std"],
        scalers=["identity", "amplification", "attenuation"],
        deg=torch.tensor([1, 2, 4, 3, 1]),
    )


@model("graphs", source="torch_geometric, nn/models/basic_gnn.py, EdgeCNN")
def edge_cnn():
    return geometric("EdgeCNN")


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        import torch_geometric.nn as gnn

        self.convs = nn.ModuleList([gnn.CGConv(5, dim=3, batch_norm=True) for _ in range(2)])
        self.conv = gnn.GENConv(5, 8, aggr="softmax", t=1.0, learn_t=True, num_layers=2, norm="batch", edge_dim=3)
        self.bn = gnn.BatchNorm(8)
        self.lin = nn.Linear(8, 2)

    def forward(self, x, edge_index, edge_attr):
        for conv in self.convs:
            x = conv(x, edge_index, edge_attr)
        return self.lin(self.bn(self.conv(x, edge_index, edge_attr)).relu())


@model("graphs", source="torch_geometric, nn/conv/cg_conv.py and gen_conv.py")
def crystal():
    x, edge_index, _ = graph()
    return Gated(), (x, edge_index, normal(EDGES, 3, seed=3))


class DiffPool(nn.Module):
    """torch_geometric's examples/proteins_diff_pool.py."""

    def __init__(self, nodes=8, features=4, hidden=6, classes=2):
        super().__init__()
        from torch_geometric.nn import DenseSAGEConv

        class GNN(nn.Module):
            def __init__(self, inputs, hidden, outputs, lin=True):
                super().__init__()
                self.convs, self.bns = nn.ModuleList(), nn.ModuleList()
                for n_in, n_out in ((inputs, hidden), (hidden, hidden), (hidden, outputs)):
                    self.convs.append(DenseSAGEConv(n_in, n_out, normalize=True))
                    self.bns.append(nn.BatchNorm1d(n_out))
                self.lin = nn.Linear(2 * hidden + outputs, outputs) if lin else None

            def bn(self, i, x):
                batch_size, num_nodes, num_channels = x.size()
                x = x.view(-1, num_channels)
                x = self.bns[i](x)
                return x.view(batch_size, num_nodes, num_channels)

            def forward(self, x, adj, mask=None):
                xs = [x]
                for step in range(3):
                    xs.append(self.bn(step, self.convs[step](xs[-1], adj, mask).relu()))
                x = torch.cat(xs[1:], dim=-1)
                return self.lin(x).relu() if self.lin is not None else x

        self.gnn1_pool, self.gnn1_embed = GNN(features, hidden, nodes // 2), GNN(features, hidden, hidden, lin=False)
        self.gnn2_embed = GNN(3 * hidden, hidden, hidden, lin=False)
        self.lin1, self.lin2 = nn.Linear(3 * hidden, hidden), nn.Linear(hidden, classes)

    def forward(self, x, adj, mask):
        from torch_geometric.nn import dense_diff_pool

        s, x = self.gnn1_pool(x, adj, mask), self.gnn1_embed(x, adj, mask)
        x, adj, l1, e1 = dense_diff_pool(x, adj, s, mask)
        x = self.gnn2_embed(x, adj)
        x = x.mean(dim=1)
        x = self.lin2(self.lin1(x).relu())
        return F.log_softmax(x, dim=-1), l1, e1


@model("graphs", source="torch_geometric, examples/proteins_diff_pool.py")
def diff_pool():
    adj = (integers(2, 3, 8, 8) + integers(2, 3, 8, 8, seed=1).transpose(1, 2)).clamp(max=1).double()
    mask = torch.arange(8)[None] < torch.tensor([8, 6, 5])[:, None]
    return DiffPool(), (normal(3, 8, 4), adj, mask)


class GraphConvolution(nn.Module):
    """GCN with index_add_: degrees and messages, self-loops appended."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        nn.init.xavier_uniform_(self.weight)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x, src, dst):
        n = x.size(0)
        loops = torch.arange(n, device=x.device)
        src, dst = torch.cat([src, loops]), torch.cat([dst, loops])
        deg = torch.zeros(n, dtype=x.dtype).scatter_add_(0, dst, torch.ones(dst.numel(), dtype=x.dtype))
        norm = deg.pow(-0.5)
        norm[norm == float("inf")] = 0
        norm = norm[src] * norm[dst]
        support = x @ self.weight
        out = torch.zeros_like(support)
        out.index_add_(0, dst, norm.unsqueeze(-1) * support[src])
        return F.relu(self.bn(out))


class GCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([GraphConvolution(5, 8), GraphConvolution(8, 8)])
        self.readout = nn.Linear(16, 2)

    def forward(self, x, edge_index, batch):
        for conv in self.convs:
            x = conv(x, edge_index[0], edge_index[1])
        index = batch.unsqueeze(-1).expand_as(x)
        top = torch.full((GRAPHS, x.size(1)), float("-inf"), dtype=x.dtype)
        top = top.scatter_reduce(0, index, x, reduce="amax", include_self=False)
        mean = torch.zeros(GRAPHS, x.size(1), dtype=x.dtype).scatter_reduce(0, index, x, "mean", include_self=False)
        return self.readout(torch.cat([top, mean], 1))


@model("graphs", source="https://github.com/tkipf/pygcn, pygcn/layers.py, with index_add_ for the sparse product")
def gcn_index_add():
    return GCN(), graph()


class GatedGCNLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.A, self.B, self.C = (nn.Linear(width, width) for _ in range(3))
        self.D, self.E = (nn.Linear(width, width) for _ in range(2))
        self.bn_node_h, self.bn_node_e = nn.BatchNorm1d(width), nn.BatchNorm1d(width)

    def forward(self, h, e, src, dst):
        h_in, e_in = h, e
        ah, bh, dh, eh, ce = self.A(h), self.B(h), self.D(h), self.E(h), self.C(e)
        e = dh[src] + eh[dst] + ce
        sigma = torch.sigmoid(e)
        total = torch.zeros_like(h).index_add(0, dst, sigma * bh[src])
        weight = torch.zeros_like(h).index_add(0, dst, sigma)
        h = ah + total / (weight + 1e-6)
        h, e = self.bn_node_h(h), self.bn_node_e(e)
        return h_in + F.relu(h), e_in + F.relu(e)


class GatedGCN(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embedding_h, self.embedding_e = nn.Embedding(6, width), nn.Embedding(4, width)
        self.embedding_pos = nn.Linear(3, width)
        self.layers = nn.ModuleList([GatedGCNLayer(width) for _ in range(2)])
        self.out = nn.Linear(width, 1)

    def forward(self, atoms, bonds, edge_index, positions):
        h, e = self.embedding_h(atoms) + self.embedding_pos(positions), self.embedding_e(bonds)
        src, dst = edge_index
        for layer in self.layers:
            h, e = layer(h, e, src, dst)
        return self.out(h).view(-1, 4).mean(1), e


@model("graphs", source="https://github.com/graphdeeplearning/benchmarking-gnns, layers/gated_gcn_layer.py")
def gated_gcn():
    _, edges, _ = graph()
    return GatedGCN(), (integers(6, NODES), integers(4, EDGES), edges, normal(NODES, 3))


class DenseGIN(nn.Module):
    """GIN of https://github.com/weihua916/powerful-gnns: BatchNorm in MLPs and between layers, sparse products."""

    def __init__(self, inputs=5, hidden=8, layers=3, classes=2):
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(layers - 1))
        self.mlps, self.batch_norms, self.linears_prediction = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for layer in range(layers - 1):
            width = inputs if layer == 0 else hidden
            mlp = [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, hidden)]
            self.mlps.append(nn.Sequential(*mlp))
            self.batch_norms.append(nn.BatchNorm1d(hidden))
        for layer in range(layers):
            self.linears_prediction.append(nn.Linear(inputs if layer == 0 else hidden, classes))

    def forward(self, x, edge_index, batch):
        ones = torch.ones(edge_index.shape[1], dtype=x.dtype)
        adjacency = torch.sparse_coo_tensor(edge_index, ones, (x.shape[0], x.shape[0]))
        pool = torch.sparse_coo_tensor(
            torch.stack([batch, torch.arange(len(batch))]), torch.ones(len(batch), dtype=x.dtype), (GRAPHS, x.shape[0])
        )
        hidden = [x]
        h = x
        for i, (mlp, bn) in enumerate(zip(self.mlps, self.batch_norms, strict=True)):
            pooled = torch.spmm(adjacency, h) + (1 + self.eps[i]) * h
            h = F.relu(bn(mlp(pooled)))
            hidden.append(h)
        score = 0
        for layer, h in enumerate(hidden):
            score += F.dropout(self.linears_prediction[layer](torch.spmm(pool, h)), 0.0, training=self.training)
        return score


@model("graphs", source="https://github.com/weihua916/powerful-gnns, models/graphcnn.py: torch.spmm of sparse matrices")
def gin_spmm():
    return DenseGIN(), graph()


class VirtualNode(nn.Module):
    """OGB's GIN with a virtual node: one more node a graph, with an MLP and BatchNorm of its own."""

    def __init__(self, width=8):
        super().__init__()
        self.node = nn.Linear(5, width)
        self.virtualnode_embedding = nn.Embedding(1, width)
        nn.init.constant_(self.virtualnode_embedding.weight.data, 0)
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Linear(2 * width, width)
            )
            for _ in range(2)
        )
        self.batch_norms = nn.ModuleList([nn.BatchNorm1d(width) for _ in range(2)])
        self.mlp_virtualnode_list = nn.ModuleList([
            nn.Sequential(nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width), nn.ReLU(),
                          nn.Linear(2 * width, width), nn.BatchNorm1d(width), nn.ReLU())
        ])  # fmt: skip
        self.head = nn.Linear(width, 1)

    def forward(self, x, edge_index, batch):
        from torch_geometric.utils import scatter

        virtual = self.virtualnode_embedding(torch.zeros(batch[-1].item() + 1).to(edge_index.dtype))
        h_list = [self.node(x)]
        for layer in range(2):
            h_list[layer] = h_list[layer] + virtual[batch]
            h = h_list[layer]
            message = F.relu(h[edge_index[0]])
            h = self.convs[layer](h + scatter(message, edge_index[1], dim=0, dim_size=h.size(0), reduce="sum"))
            h = self.batch_norms[layer](h)
            h_list.append(h if layer == 1 else F.relu(h))
            if layer < 1:
                pooled = scatter(h_list[layer], batch, dim=0, reduce="sum") + virtual
                virtual = virtual + self.mlp_virtualnode_list[layer](pooled)
        return self.head(scatter(h_list[-1], batch, dim=0, reduce="mean"))


@model(
    "graphs",
    source="https://github.com/snap-stanford/ogb, examples/graphproppred/mol/conv.py: sizes read from batch[-1]",
)
def gin_virtual_node():
    return VirtualNode(), graph()
